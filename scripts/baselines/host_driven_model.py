"""The model that `host_driven_decode.py` times: experts in host memory, the host in command.

Logits do not depend on which experts lie in slots: what is multiplied with what, and in which
order answers are added, follows from the routing alone.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

SPREAD = 0.02
"""Of random weights, as published models are initialised."""


@dataclass(frozen=True)
class Config:
    """Sizes and settings, named as in a config.json; the defaults are Qwen1.5-MoE-A2.7B's."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    norm_topk_prob: bool = False

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Layer(NamedTuple):
    """Weights of a layer; all but `experts` are on the device.

    `experts` [experts, 3 ffn, hidden] holds rows of gate, rows of up, and the elements of down
    [hidden, ffn].
    """

    input_norm: Any
    qkv: Any
    qkv_bias: Any
    output: Any
    post_norm: Any
    router: Any
    shared_gate: Any
    shared_gate_up: Any
    shared_down: Any
    experts: Any


class Model(NamedTuple):
    """All weights."""

    config: Config
    embedding: Any
    layers: list[Layer]
    final_norm: Any
    head: Any


class Slot(NamedTuple):
    """Memory of one expert on the device, and its matrices as views of it."""

    packed: Any
    gate_up: Any
    down: Any


class ExpertCache:
    """The slots of one layer; the least recently used expert makes room."""

    def __init__(self, layer: Layer, config: Config, num_slots: int):
        ffn, hidden = config.moe_intermediate_size, config.hidden_size
        memory = layer.router.new_zeros((num_slots, 3 * ffn, hidden))
        self.slots = [
            Slot(packed, packed[: 2 * ffn], packed[2 * ffn :].view(hidden, ffn))
            for packed in memory.unbind()
        ]
        self.host = layer.experts.unbind()
        self.free = list(reversed(self.slots))
        self.slot_of: OrderedDict[int, Slot] = OrderedDict()

    def waves(self, experts: Iterable[int]) -> Iterator[list[int]]:
        """The demanded experts, at most one for each slot at a time, those that are there first."""
        ordered = sorted(experts, key=lambda expert: expert not in self.slot_of)
        for first in range(0, len(ordered), len(self.slots)):
            yield ordered[first : first + len(self.slots)]

    def place(self, experts: Sequence[int]) -> list[int]:
        """Gives each a slot; those returned are yet to be copied into theirs."""
        missing = []
        for expert in experts:
            if expert in self.slot_of:
                self.slot_of.move_to_end(expert)
            else:
                missing.append(expert)
        for expert in missing:
            slot = self.free.pop() if self.free else self.slot_of.popitem(last=False)[1]
            self.slot_of[expert] = slot
        return missing

    def copy(self, expert: int) -> None:
        """Starts the copy of an expert into its slot, on the current stream."""
        self.slot_of[expert].packed.copy_(self.host[expert], non_blocking=True)


class Decoder:
    """Decodes one batch, every request at the same position.

    Args:
      model: Weights.
      batch_size: Requests.
      num_slots: Experts that the device can hold, of each layer.
      context: Position of the first token; what lies before it is random.
      num_positions: Room in the cache of keys and values.
      has_side_stream: Whether experts are copied on a stream of their own.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        num_slots: int,
        *,
        context: int,
        num_positions: int,
        has_side_stream: bool = True,
    ):
        config, like = model.config, model.embedding
        self.model, self.batch_size = model, batch_size
        self.caches = [ExpertCache(layer, config, num_slots) for layer in model.layers]
        shape = (2, batch_size, config.num_key_value_heads, num_positions, config.head_dim)
        self.keys_values = [like.new_zeros(shape) for _ in model.layers]
        generator = torch.Generator(like.device).manual_seed(1)
        for cache in self.keys_values:
            cache[:, :, :, :context].normal_(generator=generator)
        self.cos, self.sin = rotations(config, num_positions, like)
        has_side_stream = has_side_stream and like.device.type == "cuda"
        self.side = torch.cuda.Stream() if has_side_stream else None
        self.landed = [torch.cuda.Event() for _ in range(num_slots)] if has_side_stream else []
        self.num_demands = self.num_misses = 0

    def step(self, token_ids: Any, position: int, replayed: Any = None) -> Any:
        """Logits behind one more token of every request.

        Args:
          token_ids: The tokens, on the device.
          position: Where they belong.
          replayed: Experts [layers, batch, topk] that override the router's choice.
        """
        model = self.model
        x = functional.embedding(token_ids, model.embedding)
        for number, layer in enumerate(model.layers):
            x = x + self._attend(number, layer, self._norm(x, layer.input_norm), position)
            chosen = None if replayed is None else replayed[number]
            x = x + self._mix(number, layer, self._norm(x, layer.post_norm), chosen)
        return functional.linear(self._norm(x, model.final_norm), model.head)

    def _norm(self, x: Any, weight: Any) -> Any:
        config = self.model.config
        return functional.rms_norm(x, (config.hidden_size,), weight, config.rms_norm_eps)

    def _attend(self, number: int, layer: Layer, x: Any, position: int) -> Any:
        config = self.model.config
        num_kv, head_dim = config.num_key_value_heads, config.head_dim
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(self.batch_size, -1, head_dim)
        turned, values = qkv[:, :-num_kv], qkv[:, -num_kv:]
        turned = rotate(turned, self.cos[position], self.sin[position])
        keys_values = self.keys_values[number]
        keys_values[0, :, :, position] = turned[:, -num_kv:]
        keys_values[1, :, :, position] = values
        keys, values = keys_values[:, :, :, : position + 1].unbind()
        gathered = functional.scaled_dot_product_attention(
            turned[:, :-num_kv, None],
            keys,
            values,
            enable_gqa=num_kv < config.num_attention_heads,
        )
        return functional.linear(gathered.reshape(self.batch_size, -1), layer.output)

    def _mix(self, number: int, layer: Layer, x: Any, chosen: Any) -> Any:
        """The experts' answers to the normed tokens, and the shared expert's."""
        config = self.model.config
        topk, cache = config.num_experts_per_tok, self.caches[number]
        probabilities = functional.linear(x, layer.router).float().softmax(-1)
        if chosen is None:
            weights, chosen = probabilities.topk(topk)
        else:
            weights = probabilities.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        # Answers are made expert by expert, so their inputs are put in that order, by the device.
        order = None if self.batch_size == 1 else chosen.flatten().argsort(stable=True)
        rows = x.expand(topk, -1) if order is None else x[order // topk]
        # The host waits here, in every layer.
        numbers = [expert for choice in chosen.tolist() for expert in choice]
        ranges = expert_ranges(numbers, is_sorted=order is not None)
        self.num_demands += len(ranges)
        answers, shared = torch.empty_like(rows), None
        for wave, experts in enumerate(cache.waves(ranges)):
            missing = cache.place(experts)
            self.num_misses += len(missing)
            # All that came before the router is done, so the first wave has nothing to wait for.
            self._fetch(cache, missing, may_overtake=wave == 0)
            if shared is None:
                shared = self._shared(layer, x)
            present = [expert for expert in experts if expert not in missing]
            for expert in present + missing:
                if self.side is not None and expert in missing:
                    torch.cuda.current_stream().wait_event(self.landed[missing.index(expert)])
                first, last = ranges[expert]
                slot = cache.slot_of[expert]
                torch.mm(
                    swiglu(rows[first:last], slot.gate_up), slot.down.T, out=answers[first:last]
                )
        if order is not None:
            answers = torch.empty_like(answers).index_copy_(0, order, answers)
        answers = answers.view(self.batch_size, topk, -1)
        return shared + (weights.to(x.dtype)[:, None] @ answers)[:, 0]

    def _fetch(self, cache: ExpertCache, missing: list[int], *, may_overtake: bool) -> None:
        if self.side is None:
            for expert in missing:
                cache.copy(expert)
        elif missing:
            if not may_overtake:
                self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                for expert, landed in zip(missing, self.landed, strict=False):
                    cache.copy(expert)
                    landed.record()

    def _shared(self, layer: Layer, x: Any) -> Any:
        answer = functional.linear(swiglu(x, layer.shared_gate_up), layer.shared_down)
        return functional.linear(x, layer.shared_gate).sigmoid() * answer


def make_model(
    config: Config, dtype: Any, device: str, num_distinct: int | None = None, seed: int = 0
) -> Model:
    """A model with random weights, drawn on the device.

    Args:
      config: Sizes.
      dtype: Of all weights.
      device: Where all but the experts stay.
      num_distinct: Layers whose experts are made; the others repeat them in turn. All if None.
      seed: Of the weights.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Any:
        weights = torch.empty(shape, dtype=dtype, device=device)
        return weights.normal_(std=SPREAD, generator=generator)

    hidden, ffn = config.hidden_size, config.moe_intermediate_size
    num_shared = config.shared_expert_intermediate_size
    num_queries = config.num_attention_heads * config.head_dim
    num_qkv = num_queries + 2 * config.num_key_value_heads * config.head_dim
    made = min(num_distinct or config.num_hidden_layers, config.num_hidden_layers)
    experts = [
        to_host(draw(config.num_experts, 3 * ffn, hidden), device=device) for _ in range(made)
    ]
    layers = [
        Layer(
            input_norm=1 + draw(hidden),
            qkv=draw(num_qkv, hidden),
            qkv_bias=draw(num_qkv),
            output=draw(hidden, num_queries),
            post_norm=1 + draw(hidden),
            router=draw(config.num_experts, hidden),
            shared_gate=draw(1, hidden),
            shared_gate_up=draw(2 * num_shared, hidden),
            shared_down=draw(hidden, num_shared),
            experts=experts[number % made],
        )
        for number in range(config.num_hidden_layers)
    ]
    embedding, head = draw(config.vocab_size, hidden), draw(config.vocab_size, hidden)
    return Model(config, embedding, layers, 1 + draw(hidden), head)


def to_host(weights: Any, device: str) -> Any:
    if device != "cuda":
        return weights
    host = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=True)
    return host.copy_(weights)


def rotations(config: Config, num_positions: int, like: Any) -> tuple[Any, Any]:
    """Cosine and sine of every position, as rotary embeddings need them."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=like.device)
    speeds = config.rope_theta ** (-pairs / config.head_dim)
    places = torch.arange(num_positions, dtype=torch.float32, device=like.device)
    angles = torch.outer(places, speeds).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def swiglu(x: Any, gate_up: Any) -> Any:
    gate, up = functional.linear(x, gate_up).chunk(2, -1)
    return functional.silu(gate) * up


def expert_ranges(experts: Sequence[int], *, is_sorted: bool) -> dict[int, tuple[int, int]]:
    """Rows of each demanded expert, from the first to before the last, in the order of rows."""
    ranges: dict[int, tuple[int, int]] = {}
    for row, expert in enumerate(sorted(experts) if is_sorted else experts):
        first, _ = ranges.get(expert, (row, row))
        ranges[expert] = (first, row + 1)
    return ranges
