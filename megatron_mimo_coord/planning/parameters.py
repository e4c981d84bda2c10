"""The parameters of each rank of a module, as Megatron's layers register them."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

from attrs import frozen

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.module_sizes import ModuleSizes


@frozen
class Parameter:
    """A parameter on one rank.

    Args:
        numel: its numbers.
        is_expert: whether it is reduced over the expert data-parallel group, apart from the rest.
        is_shared: whether it is one of the two copies of a tied embedding, on different stages.
        inputs: width of what it multiplies, if it is a matrix of a product; else 0.
        uses: how often a token of the module meets that product, on average.
        of_mlp: whether it belongs to a layer's MLP or mixture.
    """

    numel: int
    is_expert: bool = False
    is_shared: bool = False
    inputs: int = 0
    uses: float = 1.0
    of_mlp: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations of a token's forward pass: two for each weight of a matrix."""
        return 2 * self.uses * self.numel if self.inputs else 0.0


@cache
def stage_layers(sizes: ModuleSizes, parallelism: ModuleParallelism) -> tuple[range, ...]:
    """Indices of each stage's layers in the whole module."""
    ends = [0, *accumulate(parallelism.layers_of_stages(sizes.num_layers))]
    return tuple(range(start, stop) for start, stop in pairwise(ends))


Shards = tuple[int, int, int]
"""TP, TP of an expert, and EP."""


def shards_of(parallelism: ModuleParallelism) -> Shards:
    """Into how many parts ranks cut a layer."""
    return parallelism.tensor_model_parallel_size, *parallelism.expert_shape[:2]


@cache
def layers_parameters(
    sizes: ModuleSizes, layers: range, language_hidden_size: int, shards: Shards = (1, 1, 1)
) -> Sequence[Parameter]:
    """The parameters of some layers on one rank, in the order in which Megatron registers them.

    What stands before the first layer and behind the last comes with these. Layers are those of
    ``get_gpt_layer_local_spec``; Transformer Engine's register as many numbers in another order.

    Args:
        sizes: of the module.
        layers: their indices in the whole module.
        language_hidden_size: what an encoder projects to.
        shards: they divide what they share.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> sum(each.numel for each in layers_parameters(sizes, range(1, 2), 64))
        58304
    """
    is_first, is_last, tp = layers.start == 0, layers.stop == sizes.num_layers, shards[0]
    found: list[Parameter] = []
    if is_first:
        found += _inputs(sizes, tp, is_last)
    for layer in layers:
        found += _layer(sizes, shards, sizes.has_experts(layer))
    if is_last:
        found += _norm(sizes, sizes.hidden_size)
        found += _outputs(sizes, tp, is_first, language_hidden_size)
    return tuple(found)


@cache
def layers_numel(
    sizes: ModuleSizes, layers: range, language_hidden_size: int, shards: Shards = (1, 1, 1)
) -> int:
    """Numbers in :func:`layers_parameters`."""
    every = layers_parameters(sizes, layers, language_hidden_size, shards)
    return sum(each.numel for each in every)


def _inputs(sizes: ModuleSizes, tp: int, is_last: bool) -> Iterator[Parameter]:
    """What turns words or patches into hidden states; an encoder's is on every rank whole."""
    hidden = sizes.hidden_size
    if sizes.vocab_size is not None:
        tied = sizes.share_embeddings_and_output_weights
        yield Parameter(
            sizes.vocab_size // tp * hidden,
            is_shared=tied and not is_last,
            inputs=hidden if tied and is_last else 0,  # it is the output layer too
        )
        if sizes.position_embedding_type == "learned_absolute" and sizes.seq_length:
            yield Parameter(sizes.seq_length * hidden)
    elif sizes.patch_size:
        yield Parameter(sizes.sequence * hidden)  # positions
        yield from _linear(sizes.patch_size, hidden)


def _outputs(
    sizes: ModuleSizes, tp: int, is_first: bool, language_hidden_size: int
) -> Iterator[Parameter]:
    """A language model's output layer, or an encoder's projection."""
    if sizes.vocab_size is not None:
        tied, hidden = sizes.share_embeddings_and_output_weights, sizes.hidden_size
        if not (tied and is_first):
            yield Parameter(sizes.vocab_size // tp * hidden, is_shared=tied, inputs=hidden)
        return
    widths = [sizes.merged_size, sizes.projection_hidden_size, language_hidden_size]
    for inputs, outputs in pairwise(filter(None, widths)):
        yield from _linear(inputs, outputs, uses=sizes.output_tokens / sizes.sequence)


def _linear(inputs: int, outputs: int, bias: bool = True, **kind: Any) -> Iterator[Parameter]:
    yield Parameter(inputs * outputs, inputs=inputs, **kind)
    if bias:
        yield Parameter(outputs, **kind)


def _norm(sizes: ModuleSizes, width: int) -> Iterator[Parameter]:
    yield Parameter(width)
    if sizes.normalization == "LayerNorm":
        yield Parameter(width)


@cache
def _layer(sizes: ModuleSizes, shards: Shards, has_experts: bool) -> Sequence[Parameter]:
    hidden, tp = sizes.hidden_size, shards[0]
    qkv = (sizes.query_size + 2 * sizes.key_size) // tp
    norm, of_heads = tuple(_norm(sizes, hidden)), tuple(_norm(sizes, sizes.kv_channels))
    mlp = _mlp(sizes, sizes.ffn_hidden_size // tp, sizes.add_bias_linear)
    return (
        *norm,
        *_linear(sizes.query_size // tp, hidden, sizes.add_bias_linear),
        *_linear(hidden, qkv, sizes.add_bias_linear or sizes.add_qkv_bias),
        *(of_heads * 2 if sizes.qk_layernorm else ()),
        *norm,
        *(_mixture(sizes, shards) if has_experts else mlp),
    )


def _mlp(sizes: ModuleSizes, width: int, bias: bool, **kind: Any) -> Iterator[Parameter]:
    """An MLP of which this rank has ``width`` hidden numbers."""
    hidden = sizes.hidden_size
    yield from _linear(hidden, sizes.fc1_outputs * width, bias, of_mlp=True, **kind)
    yield from _linear(width, hidden, bias, of_mlp=True, **kind)


def _mixture(sizes: ModuleSizes, shards: Shards) -> Iterator[Parameter]:
    """The router, this rank's experts and the shared expert."""
    assert sizes.num_moe_experts, "only layers with experts come here"
    (tp, expert_tp, ep), bias = shards, sizes.add_bias_linear
    yield from _linear(sizes.hidden_size, sizes.num_moe_experts, bias, of_mlp=True)
    reduced_apart = ep > 1 or expert_tp != tp
    uses = sizes.moe_router_topk / sizes.num_moe_experts
    width = sizes.moe_ffn_hidden_size // expert_tp
    expert = tuple(_mlp(sizes, width, bias, is_expert=reduced_apart, uses=uses))
    yield from expert * (sizes.num_moe_experts // ep)
    if sizes.moe_shared_expert_intermediate_size:
        yield from _mlp(sizes, sizes.moe_shared_expert_intermediate_size // tp, bias=False)
