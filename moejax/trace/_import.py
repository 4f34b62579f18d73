"""Other people's recordings become traces."""

import os
import stat
from pathlib import Path

from moejax.errors import BadFileError, UsageError

from ._import_npz import read_npz
from ._import_rows import read_csv, read_jsonl
from ._trace import MAX_EXPERTS, Trace
from ._validate import naming, validate_trace

_SNIFFED_BYTES = 4096


def import_trace(
    path: str | Path,
    *,
    model: str | None = None,
    num_experts: int | None = None,
    source: str = "",
    licence: str = "",
) -> Trace:
    """Reads routing from an `.npz`, a CSV or a JSONL file, told apart by content.

    The formats:
      npz: `expert_ids` [tokens, layers, topk], optionally `offsets` or `request_start`, `phase` or
        `is_decode`, `gate_prob`, `gate_weight` or `gate_weights`, `token_id` or
        `local_token_id`, `expert_bytes`, `num_experts`. Negative numbers and 255 mean "not
        computed". Pickled arrays are refused.
      CSV: columns `token` (or `step`), `layer`, `expert`, optionally `weight`, `slot` (rank in
        the router's order), `request` (or `turn`), `phase`; such as BigMoeOnEdge's `route.csv`,
        whose comments on the model and the bytes of experts are read too.
      JSONL: objects with `token_idx`, `layer_idx`, `selected_ids`, optionally `gate_weights` and
        `request_idx`.

    Args:
      path: The file to read.
      model: Name of the recorded model; overrides what the file says.
      num_experts: Experts of one layer. If None: what the file says, else the largest number seen
        plus one, which `Trace.warnings` then mentions.
      source: Where the recording comes from.
      licence: Licence of the recording.

    Raises:
      UsageError: `num_experts` is out of range.
      BadFileError: The file is unreadable, of none of these formats, or inconsistent.
    """
    if num_experts is not None and not 1 <= num_experts <= MAX_EXPERTS:
        raise UsageError(
            f"{num_experts} experts are not between 1 and {MAX_EXPERTS}", "Give another number."
        )
    path = Path(path)
    reader = {"npz": read_npz, "jsonl": read_jsonl, "csv": read_csv}[_format(path)]
    with naming(path, "`moejax trace import --help` says what a recording holds."):
        trace = reader(path, model, num_experts, source or f"imported from {path.name}", licence)
        validate_trace(trace)
    return trace


def _format(path: Path) -> str:
    try:
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFileError(f"{path} is not a file", "Give an .npz, .csv or .jsonl file.")
        with open(path, "rb") as file:
            begin = file.read(_SNIFFED_BYTES)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise BadFileError(
            f"{path} cannot be read: {cause}", "Give an .npz, .csv or .jsonl file."
        ) from error
    if begin.startswith(b"PK"):
        return "npz"
    if begin[8:9] == b"{":
        raise BadFileError(
            f"{path} looks like a safetensors file", "If it is a trace, use it as it is."
        )
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text or b"\0" in begin:
        raise BadFileError(
            f"{path} is {'binary' if text else 'empty'}", "Give an .npz, .csv or .jsonl file."
        )
    return "jsonl" if text.startswith(b"{") else "csv"
