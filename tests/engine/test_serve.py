"""Serving: every request gets its own text, whoever was in its place before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import Engine, NewToken, OffloadEngine, Sampling, serve
from moejax.engine._engine import DecodeState
from moejax.engine._programs import Place
from moejax.engine._serve import _put
from moejax.errors import BackendError, UsageError
from moejax.offload import SlotPlan
from moejax.qwen_moe import KVCache, Lookahead, empty_cache
from moejax.strategies import STRATEGIES

from ._offloaded import take_apart
from ._tiny import CONFIG, ONE_LAYER, random_model

# Buckets of 16, 16, 32, 16 and 16 tokens.
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(31, 14, -1)), [2, 7, 1, 8], [9] * 16]
NUM_NEW = 7
SAMPLING = Sampling(1.1, 0.95)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model())


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    """The text of each prompt for itself."""
    generations = [engine.generate([prompt], max_new_tokens=NUM_NEW) for prompt in PROMPTS]
    return [generation.finish().token_ids[0] for generation in generations]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_everyone_gets_the_text_that_it_gets_alone(engine, alone, batch_size):
    service = serve(engine, PROMPTS, batch_size=batch_size, max_new_tokens=NUM_NEW).finish()
    assert service.token_ids == alone
    assert service.finish_reasons == ["length"] * len(PROMPTS)
    # The first token of a text comes with its prompt; all places are busy as long as they can be.
    rounds = -(-len(PROMPTS) // batch_size)
    assert service.num_steps == rounds * (NUM_NEW - 1)


def test_places_are_taken_again_with_experts_on_the_host(alone):
    """The slots hold what the one who left has used; nobody's text depends on it."""
    plan, strategy = SlotPlan("layer", (2, 3)), STRATEGIES["lru"].make(None)
    engine = OffloadEngine(*take_apart(CONFIG), plan, strategy, kernels="xla")
    stop = {alone[0][1]}
    service = serve(engine, PROMPTS, batch_size=2, max_new_tokens=NUM_NEW, stop_token_ids=stop)
    expected = [text[: _length(text, stop)] for text in alone]
    assert service.finish().token_ids == expected
    assert engine.num_compiles == {"decode": 1}


def test_a_place_is_taken_while_others_go_on(engine, alone):
    """A text that a stop token ends early makes room for the next."""
    stop = {alone[0][1]}
    lengths = [_length(text, stop) for text in alone]
    assert lengths[0] == 2
    assert len(set(lengths)) > 1
    service = serve(engine, PROMPTS, batch_size=2, max_new_tokens=NUM_NEW, stop_token_ids=stop)
    tokens = list(service)
    assert service.token_ids == [text[:n] for text, n in zip(alone, lengths, strict=True)]
    ends = [_length(text, stop) < NUM_NEW or text[-1] in stop for text in alone]
    assert service.finish_reasons == ["stop" if is_stop else "length" for is_stop in ends]
    assert service.num_steps < 3 * (NUM_NEW - 1)
    order = [token.request for token in tokens]
    # Request 2 waits for the place of request 0, and begins before request 1 has ended.
    assert order.index(2) > order.index(0)
    assert order.index(2) < len(order) - 1 - order[::-1].index(1)


def test_tokens_come_one_by_one(engine, alone):
    texts = [[] for _ in PROMPTS]
    service = serve(engine, PROMPTS, batch_size=2, max_new_tokens=NUM_NEW)
    for token in service:
        assert isinstance(token, NewToken)
        texts[token.request].append(token.token_id)
        assert service.token_ids[token.request] == texts[token.request]
        is_last = len(texts[token.request]) == NUM_NEW
        assert token.finish_reason == ("length" if is_last else None)
    assert texts == alone


def test_draws_depend_on_the_request_and_its_own_step():
    engine = Engine(random_model(ONE_LAYER))
    options = {"max_new_tokens": NUM_NEW, "sampling": SAMPLING, "seed": 3}
    expected = [
        engine.generate([prompt], first_request=4 + number, **options).finish().token_ids[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert len({tuple(text) for text in expected}) == len(PROMPTS)
    service = serve(engine, PROMPTS, batch_size=2, first_request=4, **options).finish()
    assert service.token_ids == expected


def test_routing_is_that_of_a_request_alone(engine):
    options = {"max_new_tokens": NUM_NEW, "record": True, "lookahead": Lookahead(1, 3)}
    service = serve(engine, PROMPTS[:3], batch_size=2, **options)
    assert service.routing == ()
    for prompt, given in zip(PROMPTS, service.finish().routing, strict=False):
        (expected,) = engine.generate([prompt], **options).finish().routing
        np.testing.assert_array_equal(given.token_ids, expected.token_ids)
        np.testing.assert_array_equal(given.phase, expected.phase)
        np.testing.assert_array_equal(given.experts, expected.experts)
        np.testing.assert_array_equal(given.lookahead, expected.lookahead)
        np.testing.assert_allclose(given.routing_weights, expected.routing_weights, atol=1e-5)


class _CountedState(NamedTuple):
    kv: KVCache
    place: Place
    num_steps: jax.Array


class _Counted:
    """An engine whose state holds more, and is used up as a whole."""

    def __init__(self, engine: Engine):
        self.engine, self.config, self.last = engine, engine.config, None

    def new_state(self, batch_size, num_positions):
        return _CountedState(*self.engine.new_state(batch_size, num_positions), jnp.zeros(1))

    def read(self, settings, token_ids, num_tokens, draw):
        return self.engine.read(settings, token_ids, num_tokens, draw)

    def advance(self, settings, state, draw):
        (kv, place), token_ids, routed = self.engine.advance(
            settings, DecodeState(state.kv, state.place), draw
        )
        for array in jax.tree.leaves(state.place):
            array.delete()
        place = place._replace(token_ids=place.token_ids.copy())
        self.last = _CountedState(kv, place, state.num_steps + 1)
        return self.last, token_ids, routed


def test_the_rest_of_an_engines_state_is_left_alone(engine, alone):
    counted = _Counted(engine)
    service = serve(counted, PROMPTS, batch_size=2, max_new_tokens=NUM_NEW).finish()
    assert service.token_ids == alone
    assert counted.last is not None
    assert counted.last.num_steps.tolist() == [service.num_steps]


def test_one_compile_for_the_batch_and_one_per_bucket():
    engine = Engine(random_model(ONE_LAYER))
    serve(engine, PROMPTS, batch_size=3, max_new_tokens=4).finish()
    assert engine.num_compiles == {"prefill": 2, "decode": 1}
    serve(engine, PROMPTS[::-1], batch_size=3, max_new_tokens=5).finish()
    assert engine.num_compiles == {"prefill": 2, "decode": 1}


def test_a_single_new_token_needs_no_step():
    engine = Engine(random_model(ONE_LAYER))
    service = serve(engine, PROMPTS, batch_size=2, max_new_tokens=1).finish()
    assert [len(text) for text in service.token_ids] == [1] * len(PROMPTS)
    assert service.num_steps == 0
    assert engine.num_compiles["decode"] == 0


def test_a_request_is_put_in_its_place_and_nowhere_else():
    rows = jnp.arange(3, dtype=jnp.int32)
    old = jax.tree.map(lambda a: a + 1, empty_cache(CONFIG, 3, 16, jnp.float32))
    new = jax.tree.map(lambda a: a + 7, empty_cache(CONFIG, 1, 16, jnp.float32))
    one = jnp.array([50], jnp.int32)
    kv, place = _put(old, Place(rows, rows, rows), np.int32(1), new, Place(one, one, one))
    for array in jax.tree.leaves(kv):
        assert np.unique(np.asarray(array[1])).tolist() == [7]
        assert np.unique(np.asarray(array[::2])).tolist() == [1]
    assert all(row.tolist() == [0, 50, 2] for row in place)
    assert all(array.is_deleted() for array in jax.tree.leaves(old))


def test_overflowing_weights_are_refused():
    model = random_model(ONE_LAYER)
    model.norm.weight[...] = model.norm.weight[...] * jnp.inf
    with pytest.raises(BackendError, match="not finite"):
        serve(Engine(model), PROMPTS, batch_size=2, max_new_tokens=2).finish()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"batch_size": 0}, "a batch of 0"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"max_new_tokens": 60}, "the model's 64 positions"),
        ({"seed": -1}, "seed -1"),
        ({"record": True, "lookahead": Lookahead(0, 2)}, "0 layers"),
    ],
)
def test_impossible_requests_are_refused(engine, options, cause):
    with pytest.raises(UsageError, match=cause) as caught:
        serve(engine, PROMPTS, **{"batch_size": 2, "max_new_tokens": 1, **options})
    assert caught.value.hint


def _length(text: list[int], stop: set[int]) -> int:
    return next((n for n, token in enumerate(text, 1) if token in stop), len(text))
