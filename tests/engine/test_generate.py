"""Generation: the same texts as the plain model, whatever the batch, compiled once a bucket."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import Engine, Generation, Sampling
from moejax.engine._programs import Place, cache_bucket, prompt_bucket
from moejax.errors import UsageError
from moejax.qwen_moe import Lookahead, QwenMoe

from ._tiny import CONFIG, ONE_LAYER, plain_forward, random_model

PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(31, 14, -1))]
NUM_NEW = 9


@pytest.fixture(scope="module")
def model() -> QwenMoe:
    return random_model()


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model)


@pytest.fixture(scope="module")
def together(engine) -> Generation:
    return engine.generate(PROMPTS, max_new_tokens=NUM_NEW).finish()


def test_cached_decode_equals_the_full_forward(model, together):
    """Every token is the best one of a pass over all tokens before it."""
    texts = [prompt + new for prompt, new in zip(PROMPTS, together.token_ids, strict=True)]
    most = max(map(len, texts))
    padded = jnp.array([text + [0] * (most - len(text)) for text in texts], jnp.int32)
    logits, _ = plain_forward(model, padded)
    best = np.argmax(logits, axis=-1)
    for request, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        last = len(prompt) - 1
        assert best[request, last : len(text) - 1].tolist() == together.token_ids[request]
        np.testing.assert_allclose(
            together.prompt_logits[request], logits[request, last], atol=1e-4
        )


def test_texts_vary(together):
    """What the other tests compare is not one token repeated."""
    assert all(len(set(text)) > 2 for text in together.token_ids)


def test_a_batch_gives_the_texts_of_single_requests(engine, together):
    for request, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], max_new_tokens=NUM_NEW).finish()
        assert alone.token_ids == [together.token_ids[request]]
        np.testing.assert_allclose(
            alone.prompt_logits[0], together.prompt_logits[request], atol=1e-4
        )


def test_one_compile_per_bucket():
    engine = Engine(random_model(ONE_LAYER))
    counts = []
    for prompt, num_new in [([1], 3), ([1] * 16, 17), ([1, 2], 4), ([1], 20), ([1] * 64, 1)]:
        engine.generate([prompt], max_new_tokens=num_new)
        counts.append((engine.num_compiles["prefill"], engine.num_compiles["decode"]))
    # A text that needs a longer cache is another shape; a single new token needs no decode.
    assert counts == [(1, 1), (1, 1), (1, 1), (2, 2), (3, 2)]
    warm = engine.generate([[5]], max_new_tokens=2)
    assert warm.timing.compile_s == 0
    drawn = engine.generate([[5]], max_new_tokens=1, sampling=Sampling(1.0))
    engine.generate([[5]], max_new_tokens=1, sampling=Sampling(0.5, 0.5), seed=3)
    assert drawn.timing.compile_s > 0
    assert engine.num_compiles == {"prefill": 4, "decode": 2}


def test_buckets():
    assert [prompt_bucket(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert [cache_bucket(n) for n in (1, 17, 130, 300)] == [16, 32, 144, 320]
    assert [cache_bucket(n) for n in (2048, 2049, 2500)] == [2048, 2304, 2560]


def test_steps_come_one_by_one(engine, together):
    generation = engine.generate(PROMPTS, max_new_tokens=NUM_NEW)
    assert generation.prompt_logits is None
    for number, step in enumerate(generation):
        assert step.token_ids.dtype == np.int32
        assert step.is_live.all()
        assert [text[-1] for text in generation.token_ids] == step.token_ids.tolist()
        is_last = number == NUM_NEW - 1
        assert generation.finish_reasons == ["length" if is_last else None] * len(PROMPTS)
        assert len(generation.timing.step_s) == number
    assert generation.token_ids == together.token_ids
    assert generation.timing.ttft_s > 0
    assert generation.routing == ()


def test_stop_tokens_end_a_text(engine, together):
    """One request stops early; the other goes on, and the batch ends with its last one."""
    stop = together.token_ids[0][1]
    generation = engine.generate(PROMPTS, max_new_tokens=NUM_NEW, stop_token_ids={stop})
    live = np.array([step.is_live for step in generation])
    for request, text in enumerate(together.token_ids):
        length = text.index(stop) + 1 if stop in text else NUM_NEW
        assert generation.token_ids[request] == text[:length]
        assert generation.finish_reasons[request] == ("stop" if stop in text else "length")
        assert live[:, request].tolist() == [step < length for step in range(len(live))]
    assert generation.finish_reasons[0] == "stop"
    assert "length" in generation.finish_reasons


def test_a_batch_of_stopped_requests_ends(engine, together):
    stop = {text[1] for text in together.token_ids} | {text[0] for text in together.token_ids}
    generation = engine.generate(PROMPTS, max_new_tokens=NUM_NEW, stop_token_ids=stop).finish()
    assert generation.finish_reasons == ["stop"] * len(PROMPTS)
    assert len(generation.timing.step_s) == 0


def test_the_cache_is_updated_in_place(engine):
    """There is one cache at any time: a step takes the old one's memory for the new one."""
    generation = engine.generate(PROMPTS, max_new_tokens=4)
    shape = (len(PROMPTS), 48, CONFIG.num_key_value_heads, CONFIG.head_dim)
    caches = []
    for _ in zip(range(3), generation, strict=False):
        caches.append([array for array in jax.live_arrays() if array.shape == shape])
        assert len(caches[-1]) == 2 * CONFIG.num_hidden_layers
    assert all(array.is_deleted() for array in caches[0])


class _Tokens:
    """Newest tokens that tell when they are sent for and when they are read."""

    def __init__(self, number: int, log: list):
        self.number, self.log = number, log

    def copy_to_host_async(self):
        self.log.append(("send", self.number))

    def __array__(self, dtype=None, copy=None):
        self.log.append(("read", self.number))
        return np.array([self.number], np.int32)


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_a_token_is_read_when_later_steps_are_under_way(num_ahead):
    log = []

    def decode(cache, place):
        number = place.token_ids.number + 1
        log.append(("begin", number))
        return cache, Place(_Tokens(number, log), 0, 0), None

    generation = Generation(
        [np.array([1], np.int32)],
        prefill=lambda: (None, Place(_Tokens(0, log), 0, 0), None, None),
        decode=decode,
        max_new_tokens=6,
        stop_token_ids=(),
        compile_s=0.0,
        num_ahead=num_ahead,
    ).finish()
    assert generation.token_ids == [[0, 1, 2, 3, 4, 5]]
    assert [number for event, number in log if event == "begin"] == [1, 2, 3, 4, 5]
    for number in range(6):
        is_read = log.index(("read", number))
        assert log.index(("send", number)) < is_read
        assert log.index(("begin", max(1, min(number + num_ahead, 5)))) < is_read
        if number + num_ahead < 5:
            assert is_read < log.index(("begin", number + num_ahead + 1))


@pytest.mark.parametrize(
    ("prompts", "options", "cause"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 32]], {}, "holds token 32"),
        ([[-1]], {}, "holds token -1"),
        ([[0.5]], {}, "no list of token numbers"),
        (["text"], {}, "no list of token numbers"),
        ([[1] * 60], {"max_new_tokens": 6}, "the model's 64 positions"),
        ([[1]], {"max_new_tokens": 0}, "0 new tokens"),
        ([[1]], {"seed": -1}, "seed -1"),
        ([[1]], {"seed": 2**32}, "32 bits"),
        ([[1]], {"record": True, "lookahead": Lookahead(0, 2)}, "0 layers"),
        ([[1]], {"record": True, "lookahead": Lookahead(1, 7)}, "7 experts"),
    ],
)
def test_impossible_requests_are_refused(engine, prompts, options, cause):
    with pytest.raises(UsageError) as caught:
        engine.generate(prompts, **{"max_new_tokens": 1, **options})
    assert cause in caught.value.cause
    assert caught.value.hint


def test_a_model_without_experts_cannot_be_recorded():
    engine = Engine(random_model(replace(CONFIG, mlp_only_layers=(0, 1, 2))))
    with pytest.raises(UsageError, match="no layer"):
        engine.generate([[1]], max_new_tokens=1, record=True)


def test_fingerprints_tell_models_apart(model, engine):
    assert Engine(model).fingerprint() == engine.fingerprint()
    assert Engine(random_model(seed=1)).fingerprint() != engine.fingerprint()
    other = Engine(random_model(replace(CONFIG, rope_theta=5e4)))
    assert other.fingerprint() != engine.fingerprint()
