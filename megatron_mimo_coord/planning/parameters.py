"""The parameters of each rank of a module, as Megatron's layers register them."""

from collections.abc import Iterator
from functools import cache

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
    """

    numel: int
    is_expert: bool = False
    is_shared: bool = False


def stage_parameters(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, language_hidden_size: int
) -> list[Parameter]:
    """The parameters of a rank of a pipeline stage, in the order in which Megatron registers them.

    The layers are those of ``get_gpt_layer_local_spec``; Transformer Engine's register as many
    numbers in another order.

    Args:
        sizes: of the module.
        parallelism: how it is laid out; TP, PP and the experts' sizes divide what they share.
        stage: of the module's pipeline, from 0.
        language_hidden_size: what an encoder projects to.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> pipeline = ModuleParallelism(pipeline_model_parallel_size=2)
        >>> sum(each.numel for each in stage_parameters(sizes, pipeline, 1, 64))
        58304
    """
    return list(_stage(sizes, parallelism, stage, language_hidden_size))


def _stage(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, language_hidden_size: int
) -> Iterator[Parameter]:
    stages = parallelism.pipeline_model_parallel_size
    is_first, is_last = stage == 0, stage == stages - 1
    if is_first:
        yield from _inputs(sizes, parallelism)
    for layer in stage_layers(sizes, stages, stage):
        yield from _layer(sizes, _shards(parallelism), sizes.has_experts(layer))
    if is_last:
        yield from _norm(sizes, sizes.hidden_size)
        yield from _outputs(sizes, parallelism, language_hidden_size)


def _inputs(sizes: ModuleSizes, parallelism: ModuleParallelism) -> Iterator[Parameter]:
    """What turns words or patches into hidden states; an encoder's is on every rank whole."""
    hidden = sizes.hidden_size
    if sizes.vocab_size is not None:
        tied = sizes.share_embeddings_and_output_weights
        words = sizes.vocab_size // parallelism.tensor_model_parallel_size
        is_shared = tied and parallelism.pipeline_model_parallel_size > 1
        yield Parameter(words * hidden, is_shared=is_shared)
        if sizes.position_embedding_type == "learned_absolute" and sizes.seq_length:
            yield Parameter(sizes.seq_length * hidden)
    elif sizes.patch_size:
        yield Parameter(sizes.sequence * hidden)  # positions
        yield from _linear(sizes.patch_size, hidden)


def _outputs(
    sizes: ModuleSizes, parallelism: ModuleParallelism, language_hidden_size: int
) -> Iterator[Parameter]:
    """A language model's output layer, or an encoder's projection."""
    if sizes.vocab_size is not None:
        tied = sizes.share_embeddings_and_output_weights
        alone = parallelism.pipeline_model_parallel_size == 1
        if not (tied and alone):
            words = sizes.vocab_size // parallelism.tensor_model_parallel_size
            yield Parameter(words * sizes.hidden_size, is_shared=tied)
    elif sizes.projection_hidden_size:
        yield from _linear(sizes.merged_size, sizes.projection_hidden_size)
        yield from _linear(sizes.projection_hidden_size, language_hidden_size)
    else:
        yield from _linear(sizes.merged_size, language_hidden_size)


def _linear(inputs: int, outputs: int, bias: bool = True) -> Iterator[Parameter]:
    yield Parameter(inputs * outputs)
    if bias:
        yield Parameter(outputs)


def _norm(sizes: ModuleSizes, width: int) -> Iterator[Parameter]:
    yield Parameter(width)
    if sizes.normalization == "LayerNorm":
        yield Parameter(width)


Shards = tuple[int, int, int]
"""TP, TP of an expert, EP: the parallel sizes that a layer's parameters depend on."""


def _shards(parallelism: ModuleParallelism) -> Shards:
    return (
        parallelism.tensor_model_parallel_size,
        parallelism.expert_tensor_parallel_size,
        parallelism.expert_model_parallel_size,
    )


def stage_layers(sizes: ModuleSizes, stages: int, stage: int) -> range:
    """Indices of a stage's layers in the whole module."""
    length = sizes.num_layers // stages
    return range(stage * length, (stage + 1) * length)


@cache
def _layer(sizes: ModuleSizes, shards: Shards, has_experts: bool) -> tuple[Parameter, ...]:
    """The parameters of one layer."""
    return tuple(_of_layer(sizes, shards, has_experts))


def _of_layer(sizes: ModuleSizes, shards: Shards, has_experts: bool) -> Iterator[Parameter]:
    hidden, tp = sizes.hidden_size, shards[0]
    yield from _norm(sizes, hidden)
    yield Parameter(sizes.query_size // tp * hidden)
    if sizes.add_bias_linear:
        yield Parameter(hidden)
    qkv = (sizes.query_size + 2 * sizes.key_size) // tp
    yield from _linear(hidden, qkv, bias=sizes.has_qkv_bias)
    if sizes.qk_layernorm:
        yield from _norm(sizes, sizes.kv_channels)
        yield from _norm(sizes, sizes.kv_channels)
    yield from _norm(sizes, hidden)
    if has_experts:
        yield from _mixture(sizes, shards)
    else:
        yield from _mlp(sizes, sizes.ffn_hidden_size // tp)


def _mlp(
    sizes: ModuleSizes, width: int, is_expert: bool = False, bias: bool | None = None
) -> Iterator[Parameter]:
    """An MLP of which this rank has ``width`` hidden numbers."""
    bias = sizes.add_bias_linear if bias is None else bias
    outputs = sizes.fc1_outputs * width
    yield Parameter(sizes.hidden_size * outputs, is_expert)
    if bias:
        yield Parameter(outputs, is_expert)
    yield Parameter(width * sizes.hidden_size, is_expert)
    if bias:
        yield Parameter(sizes.hidden_size, is_expert)


def _mixture(sizes: ModuleSizes, shards: Shards) -> Iterator[Parameter]:
    """The router, this rank's experts and the shared expert."""
    assert sizes.num_moe_experts, "only layers with experts come here"
    tp, expert_tp, ep = shards
    yield from _linear(sizes.hidden_size, sizes.num_moe_experts, bias=sizes.add_bias_linear)
    reduced_apart = ep > 1 or expert_tp != tp
    for _ in range(sizes.num_moe_experts // ep):
        yield from _mlp(sizes, sizes.moe_ffn_hidden_size // expert_tp, reduced_apart)
    if sizes.moe_shared_expert_intermediate_size:
        yield from _mlp(sizes, sizes.moe_shared_expert_intermediate_size // tp, bias=False)


@frozen
class Count:
    """How many numbers a rank's parameters have.

    Args:
        dense: of parameters that are reduced over all replicas.
        expert: of those that are reduced over the experts' replicas.
    """

    dense: int
    expert: int


def count(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, language_hidden_size: int
) -> Count:
    """How many numbers :func:`stage_parameters` has, without listing them.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> count(sizes, ModuleParallelism(pipeline_model_parallel_size=2), 1, 64)
        Count(dense=58304, expert=0)
    """
    stages = parallelism.pipeline_model_parallel_size
    ends: list[Parameter] = []
    if stage == 0:
        ends += _inputs(sizes, parallelism)
    if stage == stages - 1:
        ends += _norm(sizes, sizes.hidden_size)
        ends += _outputs(sizes, parallelism, language_hidden_size)
    layers = stage_layers(sizes, stages, stage)
    with_experts = sum(map(sizes.has_experts, layers))
    dense, expert = sum(each.numel for each in ends), 0
    for number, has_experts in ((with_experts, True), (len(layers) - with_experts, False)):
        if number:
            one = _count_layer(sizes, _shards(parallelism), has_experts)
            dense, expert = dense + number * one.dense, expert + number * one.expert
    return Count(dense, expert)


@cache
def _count_layer(sizes: ModuleSizes, shards: Shards, has_experts: bool) -> Count:
    layer = _layer(sizes, shards, has_experts)
    expert = sum(each.numel for each in layer if each.is_expert)
    return Count(sum(each.numel for each in layer) - expert, expert)
