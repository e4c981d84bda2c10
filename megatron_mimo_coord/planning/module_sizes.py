"""The sizes of a module that decide what it computes and holds, under Megatron's own names."""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import NOTHING, Factory, field, frozen

from megatron_mimo_coord.layout import MAX_RANKS, is_count, must_be
from megatron_mimo_coord.planning.costs import flag, is_number

MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000  # more are slips of the pen
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


def _is_count(value: Any, most: int = MAX_RANKS - 1) -> bool:
    return is_count(value) and value <= most


def _is_list(value: Any, known: Sequence[Any]) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(each in known for each in value)


def _count(default: Any = NOTHING, most: int = MAX_RANKS - 1) -> Any:
    """A whole number; None if the module need not have it."""
    check = must_be(
        lambda value: (default is None and value is None) or _is_count(value, most),
        f"a whole number from 1 to {most}",
        "write one",
    )
    return field(default=default, validator=check)


def _counted(of: Callable[[Any], int]) -> Any:
    """A whole number that follows from other sizes, if it is not given."""
    return _count(Factory(of, takes_self=True))


def _flag(default: bool = False) -> Any:
    return field(default=default, validator=flag)


def _one_of(*choices: str | None, default: str | None) -> Any:
    known = ", ".join(repr(choice) for choice in choices if choice is not None)
    check = must_be(lambda value: value in choices, f"one of {known}", "write one of them")
    return field(default=default, validator=check)


def _number(default: Any) -> Any:
    check = must_be(lambda value: is_number(value, most=2**31), "a number, 0 or more", "write one")
    return field(default=default, validator=check)


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
            ``recompute_granularity`` may be ``"none"``, too: nothing is recomputed, and no search
            tries to.
        vocab_size: words of a language model, with padding; tensor parallelism must divide it.
            None for an encoder.
        seq_length: tokens of a sample, of a language model. None for an encoder.
        share_embeddings_and_output_weights, position_embedding_type: as in ``GPTModel``.
        use_distributed_optimizer, grad_reduce_in_fp32, overlap_grad_reduce, bucket_size,
            pad_buckets_for_high_nccl_busbw: as in ``DistributedDataParallelConfig``.
        frozen: whether none of the module's parameters is trained.
        images_per_sample: images (clips, frames) of a sample on average, of an encoder.
        max_images_per_sample: of the microbatch that needs most memory; None for the average.
        images_per_sample_deviation: standard deviation over samples; by default what the maximum is
            above the average.
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

    num_layers: int = _count(most=MOST_LAYERS)
    hidden_size: int = _count()
    num_attention_heads: int = _count()
    ffn_hidden_size: int = _counted(lambda self: 4 * self.hidden_size)
    num_query_groups: int = _counted(lambda self: self.num_attention_heads)
    kv_channels: int = _counted(lambda self: max(1, self.hidden_size // self.num_attention_heads))
    gated_linear_unit: bool = _flag()
    add_bias_linear: bool = _flag(True)
    add_qkv_bias: bool = _flag()
    normalization: str = _one_of("LayerNorm", "RMSNorm", default="LayerNorm")
    qk_layernorm: bool = _flag()
    hidden_dropout: float = _number(0.1)
    attention_dropout: float = _number(0.1)
    attention_backend: str = _one_of("auto", "flash", "fused", "unfused", "local", default="auto")
    bias_activation_fusion: bool = _flag()
    masked_softmax_fusion: bool = _flag()
    sequence_parallel: bool = _flag()
    num_moe_experts: int | None = _count(None, MOST_EXPERTS)
    moe_layer_freq: int | Sequence[int] = field(
        default=1, converter=_hashable, validator=_layer_frequency
    )
    moe_ffn_hidden_size: int = _counted(lambda self: self.ffn_hidden_size)
    moe_router_topk: int = _count(2)
    moe_shared_expert_intermediate_size: int | None = _count(None)
    recompute_granularity: str | None = _one_of("full", "selective", "none", None, default=None)
    recompute_method: str | None = _one_of("uniform", "block", None, default=None)
    recompute_num_layers: int | None = _count(None)
    recompute_modules: Sequence[str] = field(
        default=("core_attn",), converter=_hashable, validator=_modules
    )
    deallocate_pipeline_outputs: bool = _flag()
    params_dtype: str = _one_of(*BYTES, default="fp32")
    vocab_size: int | None = _count(None)
    seq_length: int | None = _count(None)
    share_embeddings_and_output_weights: bool = _flag()
    position_embedding_type: str = _one_of(
        "learned_absolute", "rope", "mrope", "yarn", "none", default="learned_absolute"
    )
    use_distributed_optimizer: bool = _flag()
    grad_reduce_in_fp32: bool = _flag()
    overlap_grad_reduce: bool = _flag()
    bucket_size: int | None = _count(None)
    pad_buckets_for_high_nccl_busbw: bool = _flag()
    frozen: bool = _flag()
    images_per_sample: float = _number(1.0)
    max_images_per_sample: float = _number(
        Factory(lambda self: self.images_per_sample, takes_self=True)
    )
    images_per_sample_deviation: float = _number(
        Factory(lambda self: max(0.0, self.max_images_per_sample - self.images_per_sample), True)
    )
    tokens_per_image: int | None = _count(None)
    output_tokens_per_image: int | None = _count(None)
    patch_size: int | None = _count(None)
    projection_hidden_size: int | None = _count(None)

    @property
    def is_language(self) -> bool:
        """Whether the module has a vocabulary, which only the language model has."""
        return self.vocab_size is not None

    @property
    def recomputed(self) -> str:
        """What is computed again for the backward pass, in a word or two."""
        if self.recompute_granularity == "selective":
            return ", ".join(self.recompute_modules)
        return "full" if self.recompute_granularity == "full" else ""

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
