"""Which workload is compared with which recording, and how the recordings are read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.bench import compare_rankings
from moejax.errors import BadFileError
from moejax.trace import Trace, import_trace, select_requests
from moejax.workloads import Workload

SEED = 0
SLOT_RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Texts of at least so many generated tokens; half of them made the targets of gpt-oss-20b.
GPT_OSS_TOKENS = 500


class Recording(NamedTuple):
    """Somebody else's recorded routing.

    Attributes:
      file: Its name in the folder of recordings.
      model: Card of the recorded model.
      num_experts: Experts a layer.
      source: Where it was published, and its licence.
      requests: Picks the requests to rank on; None takes all.
    """

    file: str
    model: str
    num_experts: int
    source: str
    requests: Callable[[Path, Trace], np.ndarray] | None = None


def gpt_oss_texts(path: Path, trace: Trace) -> np.ndarray:
    """Long generations without loops: those with even places made the targets."""
    with np.load(path) as arrays:
        is_looping = arrays["has_repetition"].astype(bool)
    return np.flatnonzero((np.diff(trace.request_start) >= GPT_OSS_TOKENS) & ~is_looping)


DEEPSEEK = Recording(
    "deepseek-v2-lite_esft_4domains.npz",
    "deepseek-v2-lite",
    64,
    "deepseek-ai/ESFT @ 579a7711 (MIT)",
)
QWEN3 = Recording(
    "qwen3-30b-a3b_bigmoe-edge_top6.npz",
    "qwen3-30b-a3b",
    128,
    "Helldez/BigMoeOnEdge (Apache-2.0), top-k reduced to 6",
)
GPT_OSS = Recording(
    "gpt-oss-20b_decode_ids.npz",
    "gpt-oss-20b",
    32,
    "AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting @ 72b368f6 (Apache-2.0), "
    "the half that made no target",
    lambda path, trace: gpt_oss_texts(path, trace)[1::2],
)
PAIRS: Mapping[str, Recording] = {
    "deepseek-v2-lite": DEEPSEEK,
    "deepseek-moe-16b": DEEPSEEK,
    "qwen3-30b-a3b": QWEN3,
    "gpt-oss-20b": GPT_OSS,
}


def rank_beside(folder: Path, workloads: Mapping[str, Workload]) -> list[dict[str, Any]]:
    """One record a pair: both rankings, how far they agree, and whether that is enough.

    Raises:
      BadFileError: A recording is missing or cannot be read.
    """
    return [rank_pair(folder, workloads[name]) for name in PAIRS]


def rank_pair(folder: Path, workload: Workload) -> dict[str, Any]:
    """The record of one workload and the recording it is paired with.

    Raises:
      BadFileError: The recording is missing or cannot be read.
    """
    recording = PAIRS[workload.name]
    path = folder / recording.file
    if not path.is_file():
        raise BadFileError(f"{path} is not here", "Name the folder of recorded routing.")
    trace = import_trace(path, num_experts=recording.num_experts)
    if recording.requests is not None:
        trace = select_requests(trace, recording.requests(path, trace))
    slots = {round(share * recording.num_experts) for share in SLOT_RATIOS} | {2 * trace.topk}
    found = compare_rankings(workload, trace, tuple(sorted(slots)), seed=SEED)
    return {
        "workload": workload.name,
        "parameters": dict(workload.parameters),
        "recording": recording.model,
        "source": recording.source,
        "topk": trace.topk,
        **dataclasses.asdict(found),
        "mean_tau": found.mean_tau,
        "is_same_ranking": found.is_same_ranking,
        "is_same_winner": found.is_same_winner,
    }
