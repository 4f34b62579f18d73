"""From the fields of a `config.json` to a `ModelSpec`."""

from dataclasses import dataclass, replace

from moejax.errors import BadFileError

from ._fields import CONFIG_HINT, Fields
from ._spec import DTYPE_BYTES, ModelSpec

# A trace stores expert numbers in 16 bits and keeps the largest for "not computed".
_MAX_EXPERTS = 65534


@dataclass(frozen=True)
class Stated:
    """What a card states because no configuration does.

    Attributes:
      expert_bytes: Size of one expert as stored; None computes it.
      dense_bits: `ModelSpec.dense_bits`.
      attention_params: `ModelSpec.attention_params`, where layers attend in several ways.
      kv_values_per_token: `ModelSpec.kv_values_per_token`, likewise.
    """

    expert_bytes: int | None = None
    dense_bits: float | None = None
    attention_params: int | None = None
    kv_values_per_token: int | None = None


@dataclass(frozen=True)
class _Family:
    """What an architecture has that its configuration does not state.

    Attributes:
      expert_size: Field that holds the width of a routed expert.
      qk_norm: Norms of queries and keys: none, over one `head`, or over `all` heads.
      dense_layers: Which layers have no experts: none, those that a `step` and a list name, or the
        `first` ones.
      is_attention_stated: Layers attend in several ways, so a card must state what the mean one
        takes.
    """

    expert_size: str = "moe_intermediate_size"
    qk_norm: str = ""
    dense_layers: str = ""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_attention_sinks: bool = False
    has_expert_bias: bool = False
    has_router_bias: bool = False
    has_shared_expert_gate: bool = False
    is_head_dim_stated: bool = False
    is_always_renormalised: bool = False
    is_attention_stated: bool = False


_FAMILIES = {
    "qwen2_moe": _Family(dense_layers="step", has_qkv_bias=True, has_shared_expert_gate=True),
    "qwen3_moe": _Family(dense_layers="step", qk_norm="head", is_head_dim_stated=True),
    "qwen4_exp_text": _Family(
        has_shared_expert_gate=True, is_head_dim_stated=True, is_attention_stated=True
    ),
    "olmoe": _Family(expert_size="intermediate_size", qk_norm="all"),
    "mixtral": _Family(expert_size="intermediate_size", is_always_renormalised=True),
    "deepseek": _Family(dense_layers="first"),
    "deepseek_v2": _Family(dense_layers="first"),
    "glm5_next_text": _Family(dense_layers="first", is_attention_stated=True),
    "gpt_oss": _Family(
        expert_size="intermediate_size",
        has_qkv_bias=True,
        has_output_bias=True,
        has_attention_sinks=True,
        has_expert_bias=True,
        has_router_bias=True,
        is_head_dim_stated=True,
        is_always_renormalised=True,
    ),
}


def read_config(
    fields: Fields,
    *,
    name: str,
    hub_id: str = "",
    source: str = "",
    note: str = "",
    stated: Stated | None = None,
) -> ModelSpec:
    """Reads the old flat and the new nested spelling of a `config.json` alike.

    Args:
      fields: The configuration; fields of no use here (rope, losses, tokens) are ignored.
      name: Name of the resulting spec.
      hub_id: `Organisation/Name`, if known.
      source: Where the fields were read.
      note: What a reader must know.
      stated: What a card says beyond the configuration.

    Raises:
      BadFileError: A field is missing, of the wrong kind, or contradicts another one.
    """
    model_type = fields.text("model_type")
    stated = Stated() if stated is None else stated
    if model_type == "switch_transformers":
        spec = _read_switch(fields, name, hub_id, source, note)
    elif model_type in _FAMILIES:
        family = _FAMILIES[model_type]
        spec = _read_decoder(fields, family, stated, name, hub_id, source, note)
    else:
        known = ", ".join([*_FAMILIES, "switch_transformers"])
        raise BadFileError(
            f"{fields.where}: model_type {model_type!r} is not known", f"Known: {known}."
        )
    expert_bytes = stated.expert_bytes
    if expert_bytes is None:
        expert_bytes = _stored_expert_bytes(fields, spec)
    spec = replace(spec, expert_bytes=expert_bytes, dense_bits=stated.dense_bits)
    _check(spec, fields.where)
    return spec


def _read_decoder(
    fields: Fields,
    family: _Family,
    stated: Stated,
    name: str,
    hub_id: str,
    source: str,
    note: str,
) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    hidden_size = fields.count("hidden_size")
    num_experts = fields.agreed_count("num_experts", "num_local_experts", "n_routed_experts")
    moe_size = fields.count(family.expert_size)
    num_moe_layers = _num_moe_layers(fields, family, num_layers)
    attention_params, kv_values_per_token = _attention(fields, family, stated, num_layers)
    shared_size = _shared_size(fields, family, moe_size)
    shared_params = 3 * hidden_size * shared_size
    if shared_size and family.has_shared_expert_gate:
        shared_params += hidden_size
    expert_params = 3 * hidden_size * moe_size
    if family.has_expert_bias:
        expert_params += 2 * moe_size + hidden_size
    return ModelSpec(
        name=name,
        hub_id=hub_id,
        model_type=fields.text("model_type"),
        num_layers=num_layers,
        num_moe_layers=num_moe_layers,
        hidden_size=hidden_size,
        vocab_size=fields.count("vocab_size"),
        num_attention_heads=fields.count("num_attention_heads"),
        num_key_value_heads=fields.count("num_key_value_heads"),
        head_dim=_head_dim(fields, family, hidden_size),
        num_experts=num_experts,
        num_experts_per_tok=fields.count(
            "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k"
        ),
        moe_intermediate_size=moe_size,
        shared_expert_intermediate_size=shared_size,
        expert_matrices=3,
        # Only layers without experts have it; a model of MoE layers alone may leave it out.
        intermediate_size=(
            fields.count("intermediate_size")
            if num_moe_layers < num_layers or fields.has("intermediate_size")
            else moe_size
        ),
        norm_topk_prob=family.is_always_renormalised or fields.flag("norm_topk_prob"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        expert_bytes=0,
        expert_params=expert_params,
        attention_params=attention_params,
        router_params=hidden_size * num_experts + (num_experts if family.has_router_bias else 0),
        shared_expert_params=shared_params,
        other_params=hidden_size,
        kv_values_per_token=kv_values_per_token,
        source=source,
        note=note,
    )


def _read_switch(fields: Fields, name: str, hub_id: str, source: str, note: str) -> ModelSpec:
    """An encoder-decoder: decoder layers attend twice, so one layer's attention is a mean."""
    num_encoder, num_decoder = fields.count("num_layers"), fields.count("num_decoder_layers")
    num_layers = num_encoder + num_decoder
    hidden_size, num_heads = fields.count("d_model"), fields.count("num_heads")
    head_dim, num_experts = fields.count("d_kv"), fields.count("num_experts")
    ffn_size = fields.count("d_ff")
    num_attentions = num_encoder + 2 * num_decoder
    attention_params = 4 * hidden_size * num_heads * head_dim * num_attentions
    attention_params += hidden_size * (2 * num_encoder + 3 * num_decoder)
    # The last norms and the position biases, one table each for encoder and decoder.
    other_params = 2 * hidden_size + 2 * fields.count("relative_attention_num_buckets") * num_heads
    return ModelSpec(
        name=name,
        hub_id=hub_id,
        model_type="switch_transformers",
        num_layers=num_layers,
        num_moe_layers=fields.count("num_sparse_encoder_layers")
        + fields.count("num_sparse_decoder_layers"),
        hidden_size=hidden_size,
        vocab_size=fields.count("vocab_size"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_tok=1,
        moe_intermediate_size=ffn_size,
        shared_expert_intermediate_size=0,
        expert_matrices=2,
        intermediate_size=ffn_size,
        norm_topk_prob=False,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        expert_bytes=0,
        expert_params=2 * hidden_size * ffn_size,
        attention_params=attention_params // num_layers,
        router_params=hidden_size * num_experts,
        shared_expert_params=0,
        other_params=other_params + attention_params % num_layers,
        kv_values_per_token=num_attentions * 2 * num_heads * head_dim,
        source=source,
        note=note,
    )


def _num_moe_layers(fields: Fields, family: _Family, num_layers: int) -> int:
    """Layers with routed experts, in the ways the architectures say it."""
    if family.dense_layers == "step":
        step = fields.count("decoder_sparse_step")
        dense = set(fields.counts("mlp_only_layers"))
        return sum((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))
    if family.dense_layers == "first":
        num_dense = fields.count("first_k_dense_replace", least=0)
        step = fields.count("moe_layer_freq") if fields.has("moe_layer_freq") else 1
        return sum(layer % step == 0 for layer in range(num_dense, num_layers))
    return num_layers


def _attention(fields: Fields, family: _Family, stated: Stated, num_layers: int) -> tuple[int, int]:
    """Parameters of a layer's attention with both norms, and a token's numbers in all caches."""
    if family.is_attention_stated:
        if stated.attention_params is None or stated.kv_values_per_token is None:
            raise BadFileError(
                f"{fields.where}: layers of {fields.text('model_type')} attend in several ways",
                "Write a card with attention_params, the mean of a layer, and "
                "kv_values_per_token, of all layers.",
            )
        return stated.attention_params, stated.kv_values_per_token
    if stated.attention_params is not None or stated.kv_values_per_token is not None:
        raise BadFileError(
            f"{fields.where}: the fields of {fields.text('model_type')} tell what attention takes",
            "Leave out attention_params and kv_values_per_token.",
        )
    hidden_size = fields.count("hidden_size")
    if fields.has("kv_lora_rank"):
        num_params, kv_values = _latent_attention(fields, hidden_size)
        return num_params, num_layers * kv_values
    head_dim = _head_dim(fields, family, hidden_size)
    q_size = fields.count("num_attention_heads") * head_dim
    kv_size = fields.count("num_key_value_heads") * head_dim
    has_bias = fields.has("attention_bias") and fields.flag("attention_bias")
    has_qkv_bias = fields.flag("qkv_bias") if fields.has("qkv_bias") else family.has_qkv_bias
    num_params = 2 * hidden_size * (q_size + kv_size) + 2 * hidden_size
    if has_qkv_bias or has_bias:
        num_params += q_size + 2 * kv_size
    if family.has_output_bias or has_bias:
        num_params += hidden_size
    if family.has_attention_sinks:
        num_params += fields.count("num_attention_heads")
    num_params += {"": 0, "head": 2 * head_dim, "all": q_size + kv_size}[family.qk_norm]
    return num_params, num_layers * 2 * kv_size


def _latent_attention(fields: Fields, hidden_size: int) -> tuple[int, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds latents."""
    num_heads = fields.count("num_attention_heads")
    rope_size, nope_size = fields.count("qk_rope_head_dim"), fields.count("qk_nope_head_dim")
    v_size, rank = fields.count("v_head_dim"), fields.count("kv_lora_rank")
    has_bias = fields.has("attention_bias") and fields.flag("attention_bias")
    q_size = num_heads * (nope_size + rope_size)
    num_params = 2 * hidden_size + hidden_size * (rank + rope_size) + rank
    num_params += rank * num_heads * (nope_size + v_size) + num_heads * v_size * hidden_size
    if has_bias:
        num_params += rank + rope_size + hidden_size
    if fields.has("q_lora_rank"):
        q_rank = fields.count("q_lora_rank")
        num_params += hidden_size * q_rank + q_rank + q_rank * q_size + (q_rank if has_bias else 0)
    else:
        num_params += hidden_size * q_size
    return num_params, rank + rope_size


def _head_dim(fields: Fields, family: _Family, hidden_size: int) -> int:
    if fields.has("kv_lora_rank"):
        return fields.count("v_head_dim")
    if fields.has("head_dim") or family.is_head_dim_stated:
        return fields.count("head_dim")
    num_heads = fields.count("num_attention_heads")
    if hidden_size % num_heads:
        raise BadFileError(
            f"{fields.where}: hidden_size {hidden_size} is no multiple of {num_heads} heads",
            "Add head_dim.",
        )
    return hidden_size // num_heads


def _shared_size(fields: Fields, family: _Family, moe_size: int) -> int:
    if family.has_shared_expert_gate:
        return fields.count("shared_expert_intermediate_size", least=0)
    if family.dense_layers != "first":
        return 0
    # Null says that there is none; a field that is not there at all says nothing.
    if "n_shared_experts" in fields.values and not fields.has("n_shared_experts"):
        return 0
    return fields.count("n_shared_experts", least=0) * moe_size


def _dtype(fields: Fields) -> str:
    """The stored type; a freshly made configuration states none and means bfloat16 here."""
    dtype = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise BadFileError(
            f"{fields.where}: dtype {dtype!r} is not known", f"Known: {', '.join(DTYPE_BYTES)}."
        )
    return dtype


def _stored_expert_bytes(fields: Fields, spec: ModelSpec) -> int:
    if not fields.has("quantization_config"):
        return spec.expert_params * spec.dtype_bytes
    table = fields.values["quantization_config"]
    method = table.get("quant_method") if isinstance(table, dict) else table
    if method != "mxfp4":
        raise BadFileError(
            f"{fields.where}: experts quantised by {method!r} cannot be sized",
            "Write a card with expert_bytes, the bytes of one expert as stored.",
        )
    # Four bits a weight and one shared 8-bit exponent for 32 weights; biases stay in dtype.
    num_weights = spec.expert_matrices * spec.hidden_size * spec.moe_intermediate_size
    return num_weights * 17 // 32 + (spec.expert_params - num_weights) * spec.dtype_bytes


def _check(spec: ModelSpec, where: str) -> None:
    if spec.num_experts > _MAX_EXPERTS:
        raise BadFileError(
            f"{where}: {spec.num_experts} experts exceed {_MAX_EXPERTS}", CONFIG_HINT
        )
    if spec.num_experts_per_tok > spec.num_experts:
        raise BadFileError(
            f"{where}: {spec.num_experts_per_tok} experts per token exceed {spec.num_experts}",
            CONFIG_HINT,
        )
    if not 1 <= spec.num_moe_layers <= spec.num_layers:
        raise BadFileError(
            f"{where}: {spec.num_moe_layers} of {spec.num_layers} layers have routed experts",
            "At least one and at most all layers can have them.",
        )
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise BadFileError(
            f"{where}: {spec.num_attention_heads} heads are no multiple of "
            f"{spec.num_key_value_heads} key-value heads",
            CONFIG_HINT,
        )
    if spec.expert_bytes < 1:
        raise BadFileError(
            f"{where}: expert_bytes = {spec.expert_bytes} must be positive", CONFIG_HINT
        )
