"""The sizes of a module that decide what it computes and holds, under Megatron's own names."""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import Factory, frozen

from megatron_mimo_coord.layout.fields import (
    checked,
    count,
    flag,
    is_count,
    list_of,
    number,
    one_of,
)

MOST = 10_000  # layers and experts: more are slips of the pen
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PATTERNS = ({0}, {1}, {0, 1})
RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


def _follows(of: Callable[[Any], Any]) -> Any:
    """A default that follows from other sizes."""
    return Factory(of, takes_self=True)


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
        packed_lengths: tokens of the samples that are packed into one row of ``seq_length``, whose
            tokens attend within their own; a row then counts as a sample. None for no packing.
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

    num_layers: int = count(most=MOST)
    hidden_size: int = count()
    num_attention_heads: int = count()
    ffn_hidden_size: int = count(_follows(lambda self: 4 * self.hidden_size))
    num_query_groups: int = count(_follows(lambda self: self.num_attention_heads))
    kv_channels: int = count(
        _follows(lambda self: max(1, self.hidden_size // self.num_attention_heads))
    )
    gated_linear_unit: bool = flag()
    add_bias_linear: bool = flag(True)
    add_qkv_bias: bool = flag()
    normalization: str = one_of("LayerNorm", "RMSNorm", default="LayerNorm")
    qk_layernorm: bool = flag()
    hidden_dropout: float = number(0.1)
    attention_dropout: float = number(0.1)
    attention_backend: str = one_of("auto", "flash", "fused", "unfused", "local", default="auto")
    bias_activation_fusion: bool = flag()
    masked_softmax_fusion: bool = flag()
    sequence_parallel: bool = flag()
    num_moe_experts: int | None = count(None, most=MOST)
    moe_layer_freq: int | Sequence[int] = checked(
        lambda value: (
            is_count(value) or (isinstance(value, list | tuple) and {*value} in _PATTERNS)
        ),
        "a whole number N, for experts in every Nth layer, or a list with 1 for a layer with "
        "experts and 0 for one without",
        "write either",
        default=1,
        converter=_hashable,
    )
    moe_ffn_hidden_size: int = count(_follows(lambda self: self.ffn_hidden_size))
    moe_router_topk: int = count(2)
    moe_shared_expert_intermediate_size: int | None = count(None)
    recompute_granularity: str | None = one_of("full", "selective", "none", default=None)
    recompute_method: str | None = one_of("uniform", "block", default=None)
    recompute_num_layers: int | None = count(None)
    recompute_modules: Sequence[str] = list_of(
        lambda value: value in RECOMPUTED_MODULES,
        f"a list of some of {', '.join(RECOMPUTED_MODULES)}",
        "write such a list",
        ("core_attn",),
        converter=_hashable,
    )
    deallocate_pipeline_outputs: bool = flag()
    params_dtype: str = one_of(*BYTES, default="fp32")
    vocab_size: int | None = count(None)
    seq_length: int | None = count(None)
    packed_lengths: Sequence[int] | None = list_of(
        is_count, "a list of numbers of tokens", "write such a list", None, converter=_hashable
    )
    share_embeddings_and_output_weights: bool = flag()
    position_embedding_type: str = one_of(
        "learned_absolute", "rope", "mrope", "yarn", "none", default="learned_absolute"
    )
    use_distributed_optimizer: bool = flag()
    grad_reduce_in_fp32: bool = flag()
    overlap_grad_reduce: bool = flag()
    bucket_size: int | None = count(None)
    pad_buckets_for_high_nccl_busbw: bool = flag()
    frozen: bool = flag()
    images_per_sample: float = number(1.0)
    max_images_per_sample: float = number(_follows(lambda self: self.images_per_sample))
    images_per_sample_deviation: float = number(
        _follows(lambda self: max(0.0, self.max_images_per_sample - self.images_per_sample))
    )
    tokens_per_image: int | None = count(None)
    output_tokens_per_image: int | None = count(None)
    patch_size: int | None = count(None)
    projection_hidden_size: int | None = count(None)

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
    def attended(self) -> float:
        """Tokens that a token attends to on average, later ones included.

        Example:
            >>> ModuleSizes(
            ...     num_layers=1, hidden_size=2, num_attention_heads=1, seq_length=8, vocab_size=8,
            ...     packed_lengths=[6, 2],
            ... ).attended
            5.0
        """
        lengths = self.packed_lengths
        return sum(n * n for n in lengths) / self.sequence if lengths else self.sequence

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
