"""From a fractional split to whole slots: round down, then grow and exchange while it helps."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._problem import TierNumbers, TierProblem
from ._step import P99, Objective, Split, objective_terms

# Moves of one slot, as changes of (retained, landing, pinned, pageable). A slot is added with the
# tiers below unchanged, or taken from one of them, so that the experts above the cut stay the same.
_GROWTH = (
    (1, 0, 0, 0),
    (1, 0, -1, 0),
    (1, 0, 0, -1),
    (0, 0, 1, 0),
    (0, 0, 1, -1),
    (0, 0, 0, 1),
    (0, 1, 0, 0),
    (-1, 1, 0, 0),
    (-1, 1, 1, 0),
    (-1, 1, 0, 1),
)
_STEPS = (1, 2, 4, 8)
_MOVES = np.array([np.multiply(k, move) for move, k in itertools.product(_GROWTH, _STEPS)])
# A move, or its opposite `len(_MOVES)` further on; the last one stays put.
_ALL_MOVES = np.concatenate([_MOVES, -_MOVES, np.zeros((1, 4), np.int64)])

_SHORTLIST = 64
# Float32 predictions of the same split differ by less than this share.
_TOLERANCE_RATIO = 1e-6

WholeSplit = Int[np.ndarray, "4 layers"]
"""Retained, landing, pinned and pageable slots of every layer."""


def round_down(split: Split) -> WholeSplit:
    """The whole slots inside a fractional split; fits wherever the split fits."""
    return np.floor(np.asarray(split, np.float64) * (1.0 - 1e-6)).astype(np.int64)


def uniform_split(
    problem: TierProblem, device: Int[np.ndarray, " layers"] | None = None
) -> WholeSplit:
    """The same number of slots for every layer; what is left over goes to the first layers.

    Args:
      problem: The problem.
      device: Device slots of each layer where only the host tiers are to be shared equally.
    """
    device_bytes, pinned_bytes, pageable_bytes = problem.slot_budgets_bytes
    room = np.full(problem.num_layers, problem.num_experts)
    if device is None:
        device = _share_equally(problem, device_bytes, room)
    pinned = _share_equally(problem, pinned_bytes, room - device)
    pageable = _share_equally(problem, pageable_bytes, room - device - pinned)
    return np.stack([device, np.zeros_like(device), pinned, pageable])


def tier_bytes(problem: TierProblem, split: WholeSplit) -> Int[np.ndarray, "3"]:
    """Bytes a split takes on the device, in pinned and in pageable host memory."""
    tiers = np.stack([split[0] + split[1], split[2], split[3]])
    return tiers @ np.asarray(problem.expert_bytes)


def improve(problem: TierProblem, split: WholeSplit, objective: Objective) -> WholeSplit:
    """Adds, removes and exchanges slots until no single change and no exchange helps.

    Args:
      problem: The problem.
      split: A split within the budgets.
      objective: What to minimise.

    Returns:
      A split within the budgets, never worse than the one given.
    """
    sizes = np.asarray(problem.expert_bytes)
    budgets = np.asarray(problem.slot_budgets_bytes)
    device_moves = np.stack([_ALL_MOVES[:, 0] + _ALL_MOVES[:, 1], *_ALL_MOVES[:, 2:].T])
    # How many bytes each move adds to each tier in each layer: [tiers, moves, layers].
    move_bytes = device_moves[:, :, None] * sizes
    while True:
        terms = np.asarray(_move_terms(problem.numbers, jnp.asarray(split), objective=objective))
        left_bytes = budgets - tier_bytes(problem, split)
        change = _best_change(problem, split, terms, move_bytes, left_bytes, objective)
        if change is None:
            return split
        split = split + change


def _share_equally(
    problem: TierProblem, budget_bytes: int, room: Int[np.ndarray, " layers"]
) -> Int[np.ndarray, " layers"]:
    num_slots = np.zeros_like(room)
    left_bytes, is_full = budget_bytes, False
    while not is_full:
        is_full = True
        for layer, size_bytes in enumerate(problem.expert_bytes):
            if num_slots[layer] < room[layer] and size_bytes <= left_bytes:
                num_slots[layer] += 1
                left_bytes -= size_bytes
                is_full = False
    return num_slots


@functools.partial(jax.jit, static_argnames="objective")
def _move_terms(
    numbers: TierNumbers, split: Int[Array, "4 layers"], *, objective: Objective
) -> Float[Array, "moves samples layers"]:
    moved = jnp.maximum(0, split[None] + _ALL_MOVES[:, :, None]).astype(jnp.float32)

    def terms(one: Float[Array, "4 layers"]) -> Float[Array, "samples layers"]:
        return objective_terms(numbers, Split(*one), objective)

    return jax.vmap(terms)(moved)


def _best_change(
    problem: TierProblem,
    split: WholeSplit,
    terms: Float[np.ndarray, "moves samples layers"],
    move_bytes: Int[np.ndarray, "3 moves layers"],
    left_bytes: Int[np.ndarray, "3"],
    objective: Objective,
) -> WholeSplit | None:
    terms = terms.astype(np.float64)
    totals = terms[-1].sum(axis=-1)
    now = _statistic(totals, objective)
    changes = np.moveaxis(terms - terms[-1], 1, -1)  # [moves, layers, samples]
    is_legal = _is_legal(problem, split)
    gains = np.where(is_legal, now - _statistic(totals + changes, objective), -np.inf)

    fits = np.all(move_bytes <= left_bytes[:, None, None], axis=0)
    singles = np.where(fits, gains, -np.inf)
    single = np.unravel_index(np.argmax(singles), singles.shape)
    best_gain = max(float(singles[single]), 0.0)
    best = [single]

    opposite = np.roll(np.arange(len(_ALL_MOVES) - 1), len(_MOVES))
    exchange_bytes = move_bytes[:, :-1, :, None] + move_bytes[:, opposite, None, :]
    fits = np.all(exchange_bytes <= left_bytes[:, None, None, None], axis=0)
    fits &= ~np.eye(problem.num_layers, dtype=bool)
    scores = np.where(fits, gains[:-1, :, None] + gains[opposite, None, :], -np.inf)
    # Gains of two layers add up for a mean; for a percentile they only point the way.
    for move, first, second in _largest(scores):
        both = totals + changes[move, first] + changes[opposite[move], second]
        gain = now - _statistic(both, objective)
        if gain > best_gain:
            best_gain, best = gain, [(move, first), (opposite[move], second)]
    if best_gain <= _TOLERANCE_RATIO * abs(now):
        return None
    change = np.zeros_like(split)
    for move, layer in best:
        change[:, layer] += _ALL_MOVES[move]
    return change


def _largest(scores: Float[np.ndarray, "..."]) -> Iterator[tuple[int, ...]]:
    """Positions of the few highest finite scores, highest first."""
    num_kept = min(_SHORTLIST, scores.size)
    kept = np.sort(np.argpartition(-scores, num_kept - 1, axis=None)[:num_kept])
    for flat in kept[np.argsort(-scores.flat[kept], kind="stable")]:
        if np.isfinite(scores.flat[flat]):
            yield np.unravel_index(flat, scores.shape)


def _is_legal(problem: TierProblem, split: WholeSplit) -> Bool[np.ndarray, "moves layers"]:
    moved = split[None] + _ALL_MOVES[:, :, None]
    retained, landing, pinned, pageable = np.moveaxis(moved, 1, 0)
    return (
        np.all(moved >= 0, axis=1)
        & (retained + pinned + pageable <= problem.num_experts)
        & (retained + landing <= problem.num_experts)
        & (landing <= float(problem.numbers.max_landing))
    )


def _statistic(totals: Float[np.ndarray, "*batch samples"], objective: Objective) -> np.ndarray:
    return np.quantile(totals, P99, axis=-1) if objective == "p99" else totals[..., 0]
