"""Every strategy's step as a GPU kernel of one program, and with experts that do not exist."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine.kernels._parts import Launch, launch
from moejax.simulate import ranks, replay
from moejax.strategies import (
    STRATEGIES,
    Access,
    CacheShape,
    Future,
    Strategy,
    always_admit,
    intelligent,
    learn_profile,
    lfu,
    lru,
    pinned,
    transitions,
    with_prefetch,
)
from moejax.trace import Trace

from ..engine.kernels._lowering import count_kernels, lower_for_gpu
from ._one_program import as_part

KEY = jax.random.key(0)
NUM_LAYERS, TOPK = 9, 3
INTERPRETED = Launch(is_interpreted=True)


def make_trace(num_experts: int, num_tokens: int = 320) -> Trace:
    rng = np.random.default_rng(num_experts)
    score = rng.random((num_tokens, NUM_LAYERS, num_experts)) + np.linspace(0, 0.5, num_experts)
    score[1:] += 0.3 * score[:-1]
    experts = np.argsort(-score, axis=-1)[..., :TOPK].astype(np.uint8)
    return Trace(experts, num_experts, np.array([0, num_tokens], np.int64))


@functools.cache
def built(num_experts: int) -> dict[str, Strategy]:
    """All strategies with and without a profile, and the wrappers."""
    profile = learn_profile(make_trace(num_experts))
    assert profile.reuse_weights is not None
    unlearned = {
        f"{name}, nothing learned": kind.make(None)
        for name, kind in STRATEGIES.items()
        if kind.learns and not kind.needs_profile
    }
    return {
        **{name: kind.make(profile) for name, kind in STRATEGIES.items()},
        **unlearned,
        "intelligent, one set of weights": intelligent(profile, (0.3, 0.2, 0.3, 0.6, 0.4, 0.5)),
        "pinned": pinned(lru(), profile, 0.2),
        "always_admit": always_admit(lfu()),
        "with_prefetch": with_prefetch(lfu(), transitions(None, online=True, reach=2)),
    }


NAMES = [
    *STRATEGIES,
    "multi_look, nothing learned",
    "intelligent, nothing learned",
    "intelligent, one set of weights",
    "pinned",
    "always_admit",
    "with_prefetch",
]


def test_all_are_listed():
    assert list(built(16)) == NAMES


def shape_for(strategy: Strategy, num_experts: int) -> CacheShape:
    """As deep as the strategy looks, which is a power of two for all of them."""
    return CacheShape(NUM_LAYERS, num_experts, TOPK, max(1, strategy.reach))


def make_access(shape: CacheShape, event: int, num_unused: int = 0) -> Access:
    """A random event; the last experts are not demanded, resident or named."""
    rng = np.random.default_rng(event)
    depth, experts = shape.depth, shape.num_experts
    exists = np.arange(experts) < experts - num_unused

    def members(*lanes, ratio=0.2):
        return jnp.asarray((rng.random((*lanes, experts)) < ratio) & exists)

    def counts(*lanes):
        return members(*lanes).astype(jnp.int32) * rng.integers(1, 3)

    next_use = rng.integers(event, event + 99, (1 + depth, experts)).astype(np.int32)
    return Access(
        event=jnp.int32(event),
        layer=jnp.int32(event % NUM_LAYERS),
        demand=counts(),
        above=counts(),
        below_before=counts(depth),
        resident=members(),
        resident_ahead=members(depth),
        capacity=jnp.int32(6),
        capacity_ahead=jnp.full(depth, 6, jnp.int32),
        lookahead=counts(depth).astype(jnp.float32) * rng.random(),
        future=Future(jnp.asarray(next_use[0]), counts(depth), jnp.asarray(next_use[1:])),
    )


def in_a_kernel(strategy: Strategy, how: Launch):
    """The step as one kernel of one program; the key is None, as in the engine."""

    def step(state, access):
        part, restore = as_part(lambda pair: strategy.step(*pair, None), (state, access))
        _, (outputs,) = launch("strategy", [part], how)
        return restore(outputs)

    return step


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_of_the_step_says_what_the_step_says(name):
    strategy = built(16)[name]
    shape = shape_for(strategy, 16)
    state = plain = jax.tree.map(lambda leaf: leaf[1], strategy.init(shape))
    kernel = jax.jit(in_a_kernel(strategy, INTERPRETED))
    step = jax.jit(lambda state, access: strategy.step(state, access, KEY))
    for event in range(1, 6 * NUM_LAYERS, NUM_LAYERS):
        access = make_access(shape, event)
        plain, expected = step(plain, access)
        state, decision = kernel(state, access)

        def same(found, wanted):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

        jax.tree.map(same, (state, decision), (plain, expected))
    if strategy.prefetches:
        assert decision.prefetch_probability.shape == (shape.depth, 16)
        assert decision.prefetch_probability.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_step_lowers_to_triton(name):
    strategy = built(64)[name]
    shape = shape_for(strategy, 64)
    state = jax.tree.map(lambda leaf: leaf[0], strategy.init(shape))
    program = lower_for_gpu(in_a_kernel(strategy, Launch()), state, make_access(shape, 5))
    assert count_kernels(program) == 1


def test_what_a_kernel_can_not_do_is_refused():
    """The control of the test above: a sort does not lower."""
    inner = lru()

    def step(state, access, key):
        state, decision = inner.step(state, access, key)
        return state, decision._replace(keep_score=jnp.sort(decision.keep_score))

    shape = shape_for(inner, 64)
    state = jax.tree.map(lambda leaf: leaf[0], inner.init(shape))
    kernel = in_a_kernel(inner._replace(step=step), Launch())
    with pytest.raises(NotImplementedError, match="sort"):
        lower_for_gpu(kernel, state, make_access(shape, 5))


# --- experts that do not exist ----------------------------------------------------------------


def padded(strategy: Strategy, num_unused: int) -> Strategy:
    """The strategy with room in its state for experts that are never demanded."""

    def init(shape: CacheShape):
        num_experts = shape.num_experts - num_unused

        def widen(leaf):
            sizes = leaf.shape[1:]
            pads = [(0, 0)] + [(0, num_unused if n == num_experts else 0) for n in sizes]
            return jnp.pad(leaf, pads)

        return jax.tree.map(widen, strategy.init(shape._replace(num_experts=num_experts)))

    return strategy._replace(init=init)


@pytest.mark.parametrize("name", ["multi_look", "intelligent", "oracle", "top_k", "pinned", "fifo"])
def test_experts_that_do_not_exist_change_no_hit(name):
    strategy = built(60)[name]
    experts = make_trace(60, 96).experts
    slots = np.array([1, 4, 9, 30])
    real = ranks(strategy, replay(experts, 60), slots, KEY, topk=TOPK)
    more = ranks(padded(strategy, 4), replay(experts, 64), slots, KEY, topk=TOPK)
    np.testing.assert_array_equal(real.num_hits, more.num_hits)
    assert real.num_hits.sum() > 0


PREDICTING = ["multi_look", "intelligent", "intelligent, nothing learned", "with_prefetch"]


@pytest.mark.parametrize("name", PREDICTING)
def test_experts_that_do_not_exist_are_never_predicted(name):
    strategy = built(60)[name]
    wide = shape_for(strategy, 64)
    more = jax.tree.map(lambda leaf: leaf[2], padded(strategy, 4).init(wide))
    real = jax.tree.map(lambda leaf: leaf[2], strategy.init(wide._replace(num_experts=60)))
    step = jax.jit(strategy.step)
    for event in range(2, 5 * NUM_LAYERS, NUM_LAYERS):
        access = make_access(wide, event, num_unused=4)
        cut = jax.tree.map(lambda leaf: leaf[..., :60] if 64 in leaf.shape else leaf, access)
        more, said = step(more, access, None)
        real, alone = step(real, cut, None)
        chance = said.prefetch_probability
        np.testing.assert_allclose(chance[:, :60], alone.prefetch_probability, rtol=1e-5, atol=1e-7)
        assert chance[:, 60:].max() == 0
    assert chance.max() > 0
