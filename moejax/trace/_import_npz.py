"""Routing arrays in an `.npz` archive."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moejax.errors import BadFileError

from ._trace import MAX_EXPERTS, Trace, expert_dtype, not_computed

# Unpacked, all arrays that are read; the largest recording known unpacks to 0.4 GB.
_MAX_UNPACKED_BYTES = 2**33
_BLOCK_IDS = 2**22
_SPELLINGS = {
    "expert_ids": ("expert_ids",),
    "request_start": ("request_start", "offsets"),
    "phase": ("phase", "is_decode"),
    "routing_weights": ("gate_prob", "gate_weight", "gate_weights"),
    "token_ids": ("token_id", "local_token_id"),
    "expert_bytes": ("expert_bytes",),
    "num_experts": ("num_experts",),
}


def read_npz(
    path: Path, model: str | None, num_experts: int | None, source: str, licence: str
) -> Trace:
    """Reads the arrays that are known and leaves the others; see `import_trace`."""
    arrays = _read_arrays(path)
    ids = _checked("expert_ids", arrays["expert_ids"], "iu", ndim=3)
    if 0 in ids.shape:
        raise BadFileError(f"expert_ids has shape {list(ids.shape)}: nothing in it")
    if num_experts is None and "num_experts" in arrays:
        stored = _checked("num_experts", arrays["num_experts"], "iu").ravel()
        if stored.size != 1 or not 1 <= stored[0] <= MAX_EXPERTS:
            raise BadFileError(f"num_experts = {stored[:3]} is no number of experts")
        num_experts = int(stored[0])
    experts, num_experts, warnings = _read_experts(ids, num_experts)
    weights = _read_weights(arrays)
    start = np.array([0, ids.shape[0]], np.int64)
    if "request_start" in arrays:
        start = _checked("offsets", arrays["request_start"], "iu", ndim=1).astype(np.int64)
    phase = None
    if "phase" in arrays:
        phase = _checked("phase", arrays["phase"], "iub", ndim=1)
        if np.any((phase != 0) & (phase != 1)):
            raise BadFileError("phase holds numbers other than 0 and 1")
        phase = phase.astype(np.uint8)
    token_ids = _to_integers("token_ids", arrays.get("token_ids"), np.dtype(np.int32))
    expert_bytes = _to_integers("expert_bytes", arrays.get("expert_bytes"), np.dtype(np.int64))
    return Trace(
        experts=experts,
        num_experts=num_experts,
        request_start=start,
        phase=phase,
        routing_weights=weights,
        token_ids=token_ids,
        expert_bytes=expert_bytes,
        model=model or "",
        source=source,
        licence=licence,
        is_router_order=weights is not None and is_descending(experts, weights, num_experts),
        warnings=warnings,
    )


def is_descending(experts: np.ndarray, weights: np.ndarray, num_experts: int) -> bool:
    """Whether the weights of no token rise along its experts."""
    if experts.shape != weights.shape:
        return False
    is_both = (experts[..., 1:] < num_experts) & (experts[..., :-1] < num_experts)
    return not np.any(is_both & (weights[..., 1:] > weights[..., :-1]))


def guessed_warning(num_experts: int) -> str:
    """What to say where the number of experts was not stated anywhere."""
    return (
        f"the number of experts was not stated: {num_experts}, the largest number seen plus one, "
        "was assumed"
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, for numpy leaves its own handle open on a damaged archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            chosen = {
                name: spelling
                for name, spellings in _SPELLINGS.items()
                for spelling in reversed(spellings)
                if spelling in archive.files
            }
            if "expert_ids" not in chosen:
                raise BadFileError(
                    "it lacks expert_ids", f"It holds: {', '.join(archive.files) or 'nothing'}"
                )
            num_bytes = sum(
                archive.zip.getinfo(f"{spelling}.npy").file_size for spelling in chosen.values()
            )
            if num_bytes > _MAX_UNPACKED_BYTES:
                raise BadFileError(f"it unpacks to {num_bytes} bytes: too large")
            return {name: archive[spelling] for name, spelling in chosen.items()}
    except BadFileError:
        raise
    except Exception as error:  # A damaged archive raises a dozen types of four libraries.
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadFileError(
            f"not a sound .npz: {cause}",
            "Write it with numpy.savez, without pickled objects.",
        ) from error


def _checked(name: str, array: np.ndarray, kinds: str, ndim: int | None = None) -> np.ndarray:
    if array.dtype.kind not in kinds or (ndim is not None and array.ndim != ndim):
        raise BadFileError(f"{name} is {array.dtype} of shape {list(array.shape)}")
    return array


def _read_experts(
    ids: np.ndarray, num_experts: int | None
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Recodes "not computed" and narrows the type, block by block."""
    largest, has_255 = -1, False
    for block in _blocks(ids):
        is_expert = (block >= 0) & (block != 255)
        if block.dtype.kind == "u":
            is_expert &= block != not_computed(block)
        if is_expert.any():
            largest = max(largest, int(block[is_expert].max()))
        has_255 |= bool(np.any(block == 255))
    if largest < 0:
        raise BadFileError("expert_ids names no expert at all")
    warnings: tuple[str, ...] = ()
    if num_experts is None:
        # Beside larger numbers 255 is an expert like any other.
        num_experts = largest + 1
        warnings = (guessed_warning(num_experts),)
        if has_255 and num_experts <= 255:
            warnings += ('255 was read as "not computed"',)
    if largest >= num_experts:
        raise BadFileError(
            f"expert_ids holds {largest}, but there are {num_experts} experts",
            "Give the right --num-experts or --model.",
        )
    if num_experts > MAX_EXPERTS:
        raise BadFileError(
            f"expert_ids holds {largest}, but at most {MAX_EXPERTS} experts are allowed"
        )
    experts = np.empty(ids.shape, expert_dtype(num_experts))
    start = 0
    for block in _blocks(ids):
        is_expert = (block >= 0) & (block < num_experts)
        narrow = np.where(is_expert, block.astype(experts.dtype), not_computed(experts))
        experts[start : start + block.shape[0]] = narrow
        start += block.shape[0]
    return experts, num_experts, warnings


def _read_weights(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    if "routing_weights" not in arrays:
        return None
    weights = _checked("routing weights", arrays["routing_weights"], "f", ndim=3)
    # Beyond 65504 a weight becomes infinite, which the validation reports.
    with np.errstate(over="ignore"):
        return weights.astype(np.float16, copy=False)


def _to_integers(name: str, array: np.ndarray | None, dtype: np.dtype) -> np.ndarray | None:
    if array is None:
        return None
    array = _checked(name, array, "iu", ndim=1)
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise BadFileError(f"{name} holds numbers that do not fit {dtype}")
    return array.astype(dtype)


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_IDS // ids[:1].size)
    for start in range(0, ids.shape[0], rows):
        yield ids[start : start + rows]
