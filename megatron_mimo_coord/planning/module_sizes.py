"""The sizes of a module that decide what it computes and holds, under Megatron's own names."""

from collections.abc import Sequence
from typing import Any

from attrs import field, frozen

from megatron_mimo_coord.layout import MAX_RANKS, is_count, must_be
from megatron_mimo_coord.planning.costs import flag, is_number

MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000  # more are slips of the pen
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


def _count(optional: bool = False, most: int = MAX_RANKS - 1) -> Any:
    """A validator of whole numbers."""
    return must_be(
        lambda value: (optional and value is None) or (is_count(value) and value <= most),
        f"a whole number from 1 to {most}",
        "write one",
    )


def _one_of(*choices: str | None) -> Any:
    known = ", ".join(repr(choice) for choice in choices if choice is not None)
    return must_be(lambda value: value in choices, f"one of {known}", "write one of them")


def _is_list(value: Any, known: Sequence[Any]) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(each in known for each in value)


_at_least_zero = must_be(
    lambda value: is_number(value, most=2**31), "a number, 0 or more", "write one"
)
_modules = must_be(
    lambda value: _is_list(value, RECOMPUTED_MODULES),
    f"a list of some of {', '.join(RECOMPUTED_MODULES)}",
    "write such a list",
)
_layer_frequency = must_be(
    lambda value: is_count(value) or (_is_list(value, (0, 1)) and len(value) > 0),
    "a whole number N, for experts in every Nth layer, or a list with 1 for a layer with experts "
    "and 0 for one without",
    "write either",
)


def _hashable(value: Any) -> Any:
    """A list from a file as something that a cache can look up."""
    return tuple(value) if isinstance(value, list) else value


def _optional(most: int = MAX_RANKS - 1) -> Any:
    """A size that a module need not have."""
    return field(default=None, validator=_count(optional=True, most=most))


@frozen(kw_only=True, cache_hash=True)
class ModuleSizes:
    """The sizes of a module, with the names and the defaults of Megatron-Core.

    Args:
        num_layers, hidden_size, num_attention_heads, ffn_hidden_size, num_query_groups,
            kv_channels, gated_linear_unit, add_bias_linear, add_qkv_bias, normalization,
            qk_layernorm, hidden_dropout, attention_dropout, attention_backend,
            bias_activation_fusion, masked_softmax_fusion, sequence_parallel, num_moe_experts,
            moe_layer_freq, moe_ffn_hidden_size, moe_router_topk,
            moe_shared_expert_intermediate_size, recompute_granularity, recompute_method,
            recompute_num_layers, recompute_modules, deallocate_pipeline_outputs, params_dtype: as
            in ``TransformerConfig``; a dtype is ``"bf16"``, ``"fp16"`` or ``"fp32"``.
            ``sequence_parallel`` counts where TP is above 1, as Megatron's trainers have it.
        vocab_size: words of a language model, with padding; tensor parallelism must divide it.
            None for an encoder.
        seq_length: tokens of a sample, of a language model. None for an encoder.
        share_embeddings_and_output_weights, position_embedding_type: as in ``GPTModel``.
        use_distributed_optimizer, grad_reduce_in_fp32, overlap_grad_reduce, bucket_size,
            pad_buckets_for_high_nccl_busbw: as in ``DistributedDataParallelConfig``.
        frozen: whether none of the module's parameters is trained.
        images_per_sample: images (clips, frames) of a sample on average, of an encoder.
        max_images_per_sample: of the microbatch that needs most memory; None for the average.
        tokens_per_image: tokens of an image inside the encoder; each image attends to itself.
        output_tokens_per_image: tokens that the language model gets of it; None for as many. If
            fewer, neighbours are concatenated before the projection.
        patch_size: numbers of a token's patch, which a linear layer embeds; None if tokens need no
            embedding.
        projection_hidden_size: width of a hidden layer in the projection to the language model;
            None for a single linear layer.

    Raises:
        ValueError: a size is of the wrong kind; :func:`size_problems` tells what does not fit
            together.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> sizes.ffn_hidden_size, sizes.num_query_groups, sizes.kv_channels
        (256, 4, 16)
    """

    num_layers: int = field(validator=_count(most=MOST_LAYERS))
    hidden_size: int = field(validator=_count())
    num_attention_heads: int = field(validator=_count())
    ffn_hidden_size: int = field(validator=_count())
    num_query_groups: int = field(validator=_count())
    kv_channels: int = field(validator=_count())
    gated_linear_unit: bool = field(default=False, validator=flag)
    add_bias_linear: bool = field(default=True, validator=flag)
    add_qkv_bias: bool = field(default=False, validator=flag)
    normalization: str = field(default="LayerNorm", validator=_one_of("LayerNorm", "RMSNorm"))
    qk_layernorm: bool = field(default=False, validator=flag)
    hidden_dropout: float = field(default=0.1, validator=_at_least_zero)
    attention_dropout: float = field(default=0.1, validator=_at_least_zero)
    attention_backend: str = field(
        default="auto", validator=_one_of("auto", "flash", "fused", "unfused", "local")
    )
    bias_activation_fusion: bool = field(default=False, validator=flag)
    masked_softmax_fusion: bool = field(default=False, validator=flag)
    sequence_parallel: bool = field(default=False, validator=flag)
    num_moe_experts: int | None = _optional(MOST_EXPERTS)
    moe_layer_freq: int | Sequence[int] = field(
        default=1, converter=_hashable, validator=_layer_frequency
    )
    moe_ffn_hidden_size: int = field(validator=_count())
    moe_router_topk: int = field(default=2, validator=_count())
    moe_shared_expert_intermediate_size: int | None = _optional()
    recompute_granularity: str | None = field(
        default=None, validator=_one_of("full", "selective", None)
    )
    recompute_method: str | None = field(default=None, validator=_one_of("uniform", "block", None))
    recompute_num_layers: int | None = _optional()
    recompute_modules: Sequence[str] = field(
        default=("core_attn",), converter=_hashable, validator=_modules
    )
    deallocate_pipeline_outputs: bool = field(default=False, validator=flag)
    params_dtype: str = field(default="fp32", validator=_one_of(*BYTES))
    vocab_size: int | None = _optional()
    seq_length: int | None = _optional()
    share_embeddings_and_output_weights: bool = field(default=False, validator=flag)
    position_embedding_type: str = field(
        default="learned_absolute",
        validator=_one_of("learned_absolute", "rope", "mrope", "yarn", "none"),
    )
    use_distributed_optimizer: bool = field(default=False, validator=flag)
    grad_reduce_in_fp32: bool = field(default=False, validator=flag)
    overlap_grad_reduce: bool = field(default=False, validator=flag)
    bucket_size: int | None = _optional()
    pad_buckets_for_high_nccl_busbw: bool = field(default=False, validator=flag)
    frozen: bool = field(default=False, validator=flag)
    images_per_sample: float = field(default=1.0, validator=_at_least_zero)
    max_images_per_sample: float = field(validator=_at_least_zero)
    tokens_per_image: int | None = _optional()
    output_tokens_per_image: int | None = _optional()
    patch_size: int | None = _optional()
    projection_hidden_size: int | None = _optional()

    @ffn_hidden_size.default
    def _ffn_hidden_size(self) -> int:
        return 4 * self.hidden_size

    @num_query_groups.default
    def _num_query_groups(self) -> int:
        return self.num_attention_heads

    @kv_channels.default
    def _kv_channels(self) -> int:
        return max(1, self.hidden_size // self.num_attention_heads)

    @moe_ffn_hidden_size.default
    def _moe_ffn_hidden_size(self) -> int:
        return self.ffn_hidden_size

    @max_images_per_sample.default
    def _max_images_per_sample(self) -> float:
        return self.images_per_sample

    @property
    def is_language(self) -> bool:
        """Whether the module has a vocabulary, which only the language model has."""
        return self.vocab_size is not None

    @property
    def query_size(self) -> int:
        """Width of all heads' queries together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_size(self) -> int:
        """Width of all query groups' keys together, which is that of their values."""
        return self.num_query_groups * self.kv_channels

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def has_flash_attention(self) -> bool:
        """Whether attention is computed block by block, so that no weights are kept."""
        return self.attention_backend in ("auto", "flash", "fused")

    @property
    def fc1_outputs(self) -> int:
        """How many times its FFN's width an MLP's first layer puts out."""
        return 2 if self.gated_linear_unit else 1

    @property
    def bytes_per_number(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES[self.params_dtype]

    @property
    def sequence(self) -> int:
        """Tokens that attend to each other."""
        return (self.seq_length if self.is_language else self.tokens_per_image) or 1

    @property
    def output_tokens(self) -> int:
        """Tokens of an image that the language model gets."""
        return self.output_tokens_per_image or self.sequence

    @property
    def merged_size(self) -> int:
        """Width of what goes into an encoder's projection."""
        return self.hidden_size * (self.sequence // self.output_tokens)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0 in the whole module, is a mixture of experts."""
        if self.num_moe_experts is None:
            return False
        if isinstance(self.moe_layer_freq, int):
            return layer % self.moe_layer_freq == 0
        return bool(self.moe_layer_freq[layer % len(self.moe_layer_freq)])

    def tokens(self, samples: float, at_most: bool = False) -> float:
        """Tokens of so many samples inside the module: on average, or as many as there can be."""
        if self.is_language:
            return samples * self.sequence
        images = self.max_images_per_sample if at_most else self.images_per_sample
        return samples * images * self.sequence
