"""The settings of a model: every field of its `config.json` is read or refused."""

from dataclasses import asdict, dataclass
from typing import Any

from moejax.cards import Fields
from moejax.errors import BadFileError

ARCHITECTURE = "Qwen2MoeForCausalLM"
MODEL_TYPE = "qwen2_moe"
DTYPES = ("bfloat16", "float16", "float32")

_HINT = "The port runs models of the architecture Qwen2MoeForCausalLM as they were published."
# Fields that say nothing about what a forward pass computes.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",  # only in training
    "max_window_layers",  # only with a sliding window
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "sliding_window",  # only with use_sliding_window
    "transformers_version",
    "use_cache",
}
_READ = {
    "bos_token_id",
    "decoder_sparse_step",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "mlp_only_layers",
    "model_type",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "qkv_bias",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "shared_expert_intermediate_size",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
    "vocab_size",
}


@dataclass(frozen=True)
class QwenMoeConfig:
    """What a model of the family is made of, under the reference's own names.

    Attributes:
      vocab_size: Tokens of the vocabulary.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the MLP in layers without experts.
      num_hidden_layers: Layers.
      num_attention_heads: Query heads.
      num_key_value_heads: Key and value heads; fewer than queries with grouped-query attention.
      num_experts: Routed experts of a layer.
      num_experts_per_tok: Experts that each token is sent to.
      moe_intermediate_size: Width of a routed expert.
      shared_expert_intermediate_size: Width of the expert that sees every token.
      norm_topk_prob: Whether the chosen experts' weights are scaled to sum to 1.
      decoder_sparse_step: Every so many layers one has experts.
      mlp_only_layers: Layers that have none, whatever the step.
      qkv_bias: Whether queries, keys and values have a bias.
      tie_word_embeddings: Whether the head is the embedding.
      rms_norm_eps: Added to the mean square in every norm.
      rope_theta: Base of the rotary frequencies.
      max_position_embeddings: Longest sequence the model was made for.
      router_aux_loss_coef: Weight of the load-balancing loss in training.
      initializer_range: Standard deviation of fresh weights.
      dtype: Type of the published weights.
      bos_token_id: First token of a sequence, if the model has one.
      eos_token_ids: Tokens that end a text.
      pad_token_id: Token that fills gaps, if the model has one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    qkv_bias: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 32768
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts."""
        return tuple(
            layer
            for layer in range(self.num_hidden_layers)
            if (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        )


def read_config(values: dict[str, Any], where: str) -> QwenMoeConfig:
    """Reads a `config.json`, in the old flat spelling or with nested `rope_parameters`.

    Args:
      values: The fields of the file.
      where: What error messages call the file.

    Raises:
      BadFileError: A field is missing, of the wrong kind, contradicts another one, or asks for
        something that the port does not do.
    """
    fields = Fields(values, where)
    if fields.text("model_type") != MODEL_TYPE:
        raise BadFileError(
            f"{where}: model_type {values['model_type']!r} is not {MODEL_TYPE}", _HINT
        )
    _refuse_foreign(fields)
    config = QwenMoeConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_hidden_layers=fields.count("num_hidden_layers"),
        num_attention_heads=fields.count("num_attention_heads"),
        num_key_value_heads=fields.count("num_key_value_heads"),
        num_experts=fields.count("num_experts"),
        num_experts_per_tok=fields.count("num_experts_per_tok"),
        moe_intermediate_size=fields.count("moe_intermediate_size"),
        shared_expert_intermediate_size=fields.count("shared_expert_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        decoder_sparse_step=fields.count("decoder_sparse_step"),
        mlp_only_layers=tuple(fields.counts("mlp_only_layers")),
        qkv_bias=fields.flag("qkv_bias") if fields.has("qkv_bias") else True,
        tie_word_embeddings=(
            fields.flag("tie_word_embeddings") if fields.has("tie_word_embeddings") else False
        ),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.count("max_position_embeddings"),
        router_aux_loss_coef=_number(fields, "router_aux_loss_coef", 0.001),
        initializer_range=_number(fields, "initializer_range", 0.02),
        dtype=_dtype(fields),
        bos_token_id=_token(fields, "bos_token_id"),
        eos_token_ids=_tokens(fields, "eos_token_id"),
        pad_token_id=_token(fields, "pad_token_id"),
    )
    _check(config, fields)
    return config


def write_config(config: QwenMoeConfig) -> dict[str, Any]:
    """The fields of a `config.json` that `read_config` and transformers both read."""
    fields = asdict(config)
    rope_theta, eos_token_ids = fields.pop("rope_theta"), fields.pop("eos_token_ids")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **fields,
        "mlp_only_layers": list(config.mlp_only_layers),
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "use_sliding_window": False,
        "eos_token_id": eos_token_ids[0]
        if len(eos_token_ids) == 1
        else list(eos_token_ids) or None,
    }


def _refuse_foreign(fields: Fields) -> None:
    """Refuses what would make the reference compute something else than the port does."""
    unknown = sorted(
        name
        for name, value in fields.values.items()
        if name not in _READ | _WITHOUT_EFFECT and value is not None and value is not False
    )
    if unknown:
        raise BadFileError(
            f"{fields.where}: {unknown[0]} = {fields.values[unknown[0]]!r} is unknown to the port",
            f"{_HINT} Remove the field if it has no effect on the forward pass.",
        )
    if fields.text("hidden_act", "silu") != "silu":
        raise BadFileError(
            f"{fields.where}: hidden_act = {fields.text('hidden_act')!r} is not silu", _HINT
        )
    if fields.has("use_sliding_window") and fields.flag("use_sliding_window"):
        raise BadFileError(f"{fields.where}: use_sliding_window is not supported", _HINT)
    kinds = fields.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise BadFileError(f"{fields.where}: layer_types other than full_attention", _HINT)
    if kinds and len(kinds) != fields.count("num_hidden_layers"):
        raise BadFileError(
            f"{fields.where}: {len(kinds)} layer_types for "
            f"{fields.count('num_hidden_layers')} layers",
            _HINT,
        )


def _rope_theta(fields: Fields) -> float:
    """The rotary base, on which all spellings must agree; scaled variants are refused."""
    bases = {"rope_theta": fields.number("rope_theta")} if fields.has("rope_theta") else {}
    for name in ("rope_parameters", "rope_scaling"):
        table = fields.values.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise BadFileError(f"{fields.where}: {name} = {table!r} is not a table", _HINT)
        kinds = [table.get(key, "default") for key in ("rope_type", "type")]
        if kinds != ["default", "default"] or set(table) - {"rope_type", "type", "rope_theta"}:
            raise BadFileError(f"{fields.where}: {name} = {table!r} is not plain RoPE", _HINT)
        if "rope_theta" in table:
            bases[name] = Fields(table, f"{fields.where}: {name}").number("rope_theta")
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{name} says {base:g}" for name, base in bases.items())
        raise BadFileError(f"{fields.where}: the rotary base is contradictory: {said}", _HINT)
    return next(iter(bases.values()), None) or fields.number("rope_theta")


def _number(fields: Fields, name: str, default: float) -> float:
    value = fields.values.get(name)
    return default if value is None else (0.0 if value == 0 else fields.number(name))


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if name not in DTYPES:
        raise BadFileError(
            f"{fields.where}: dtype {name!r} is not supported", f"Known: {', '.join(DTYPES)}."
        )
    return name


def _tokens(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.values.get(name)
    if isinstance(value, list):
        return tuple(fields.counts(name))
    token = _token(fields, name)
    return () if token is None else (token,)


def _token(fields: Fields, name: str) -> int | None:
    return fields.count(name, least=0) if fields.has(name) else None


def _check(config: QwenMoeConfig, fields: Fields) -> None:
    """Refuses counts that contradict one another."""
    faults = []
    if config.hidden_size % config.num_attention_heads or config.head_dim % 2:
        faults.append(
            f"hidden_size {config.hidden_size} does not give "
            f"{config.num_attention_heads} heads of even width"
        )
    elif fields.has("head_dim") and fields.count("head_dim") != config.head_dim:
        faults.append(f"head_dim {fields.count('head_dim')} is not {config.head_dim}")
    if config.num_attention_heads % config.num_key_value_heads:
        faults.append(
            f"{config.num_attention_heads} query heads do not share "
            f"{config.num_key_value_heads} key heads evenly"
        )
    if config.num_experts_per_tok > config.num_experts:
        faults.append(
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds {config.num_experts} experts"
        )
    if any(layer >= config.num_hidden_layers for layer in config.mlp_only_layers):
        faults.append(f"mlp_only_layers {list(config.mlp_only_layers)} names no layer")
    tokens = [config.bos_token_id, config.pad_token_id, *config.eos_token_ids]
    if any(token is not None and token >= config.vocab_size for token in tokens):
        faults.append(f"a special token is not below vocab_size {config.vocab_size}")
    if faults:
        raise BadFileError(f"{fields.where}: {'; '.join(faults)}", _HINT)
