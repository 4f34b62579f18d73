"""What the rest of moejax knows about a model: counts, widths and bytes."""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one parameter in the types a checkpoint may be stored in."""


@dataclass(frozen=True)
class ModelSpec:
    """One mixture-of-experts model; static under `jit` and hashable.

    Field names follow the reference configuration. `..._params` are numbers of parameters.

    Attributes:
      name: Card name, or the name found in a `config.json`.
      hub_id: `Organisation/Name` on the model hub; empty where there is none.
      model_type: Architecture, such as `qwen2_moe`.
      num_layers: All layers, with or without routed experts.
      num_moe_layers: Layers that have routed experts.
      num_experts: Routed experts of one MoE layer.
      num_experts_per_tok: Experts one token is routed to.
      shared_expert_intermediate_size: Width of the expert every token uses; 0 where there is none.
      expert_matrices: 3 for gated experts, 2 for plain ones.
      intermediate_size: Width of the dense feed-forward block of layers without experts.
      norm_topk_prob: Routing weights of a token are renormalised to sum to one.
      dtype: Type that everything but quantised experts is stored in.
      expert_bytes: One routed expert as stored, which may be quantised.
      expert_params: One routed expert.
      attention_params: Projections, biases and norms of one layer, router excluded; for an
        encoder-decoder the mean over its layers.
      router_params: Router of one MoE layer.
      shared_expert_params: Shared expert of one MoE layer with its gate.
      other_params: What belongs to no layer and is no embedding, such as the last norm.
      kv_values_per_token: Numbers that one token leaves in the key-value caches of all layers;
        sliding windows are ignored.
      source: Where the facts were read.
      note: What a reader must know before trusting them.
      dense_bits: Bits that a parameter outside the routed experts takes as stored, on average;
        None where they are all stored in `dtype`.
    """

    name: str
    hub_id: str
    model_type: str
    num_layers: int
    num_moe_layers: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    expert_matrices: int
    intermediate_size: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    dtype: str
    expert_bytes: int
    expert_params: int
    attention_params: int
    router_params: int
    shared_expert_params: int
    other_params: int
    kv_values_per_token: int
    source: str
    note: str = ""
    dense_bits: float | None = None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one parameter, and of one cached number, that is not quantised."""
        return DTYPE_BYTES[self.dtype]

    @property
    def routed_bytes(self) -> int:
        """All routed experts of all layers, as stored."""
        return self.num_moe_layers * self.num_experts * self.expert_bytes

    @property
    def dense_params(self) -> int:
        """Everything but the routed experts."""
        num_dense_layers = self.num_layers - self.num_moe_layers
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (
            self.num_layers * self.attention_params
            + self.num_moe_layers * (self.router_params + self.shared_expert_params)
            + num_dense_layers * self.expert_matrices * self.hidden_size * self.intermediate_size
            + embeddings
            + self.other_params
        )

    def stored_bytes(self, num_params: int) -> int:
        """Bytes of parameters outside the routed experts, as stored."""
        if self.dense_bits is None:
            return num_params * self.dtype_bytes
        return round(num_params * self.dense_bits / 8)

    @property
    def dense_bytes(self) -> int:
        """Everything but the routed experts; stays on the device."""
        return self.stored_bytes(self.dense_params)

    @property
    def attention_bytes(self) -> int:
        """Projections, router and norms of one layer."""
        return self.stored_bytes(self.attention_params + self.router_params)

    @property
    def shared_expert_bytes(self) -> int:
        """Shared expert of one layer; 0 where there is none."""
        return self.stored_bytes(self.shared_expert_params)

    @property
    def head_bytes(self) -> int:
        """The matrix that turns the last hidden state into logits."""
        return self.stored_bytes(self.vocab_size * self.hidden_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token adds to the key-value caches of all layers."""
        return self.kv_values_per_token * self.dtype_bytes

    @property
    def expert_flops(self) -> int:
        """One token through one routed expert."""
        return 2 * self.expert_params

    @property
    def shared_expert_flops(self) -> int:
        """One token through the shared expert of one layer."""
        return 2 * self.shared_expert_params

    @property
    def attention_flops(self) -> int:
        """One token through projections and router of one layer; grows with no context."""
        return 2 * (self.attention_params + self.router_params)

    @property
    def total_params(self) -> int:
        """All parameters."""
        return self.dense_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters one token uses, embeddings included."""
        routed = self.num_moe_layers * self.num_experts_per_tok * self.expert_params
        return self.dense_params + routed
