"""The parameters of each rank of a module, as Megatron's layers register them."""

from collections.abc import Iterator, Sequence
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
) -> Sequence[Parameter]:
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
    return _stage(sizes, _shards(parallelism), stage, language_hidden_size)


def num_parameters(
    sizes: ModuleSizes, parallelism: ModuleParallelism, language_hidden_size: int
) -> int:
    """The numbers that a rank of each stage has, added up.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> num_parameters(sizes, ModuleParallelism(), 64)
        116480
    """
    return _num_parameters(sizes, _shards(parallelism), language_hidden_size)


@frozen
class _Shards:
    """The parallel sizes that a rank's parameters depend on."""

    tp: int
    expert_tp: int
    ep: int
    stages: int


def _shards(parallelism: ModuleParallelism) -> _Shards:
    expert_tp, ep, _, stages = parallelism.expert_shape
    return _Shards(parallelism.tensor_model_parallel_size, expert_tp, ep, stages)


@cache
def _num_parameters(sizes: ModuleSizes, shards: _Shards, language_hidden_size: int) -> int:
    stages = (_stage(sizes, shards, stage, language_hidden_size) for stage in range(shards.stages))
    return sum(each.numel for stage in stages for each in stage)


@cache
def _stage(
    sizes: ModuleSizes, shards: _Shards, stage: int, language_hidden_size: int
) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    if stage == 0:
        found += _inputs(sizes, shards)
    for layer in stage_layers(sizes, shards.stages, stage):
        found += _layer(sizes, shards, sizes.has_experts(layer))
    if stage == shards.stages - 1:
        found += _norm(sizes, sizes.hidden_size)
        found += _outputs(sizes, shards, language_hidden_size)
    return tuple(found)


def _inputs(sizes: ModuleSizes, shards: _Shards) -> Iterator[Parameter]:
    """What turns words or patches into hidden states; an encoder's is on every rank whole."""
    hidden = sizes.hidden_size
    if sizes.vocab_size is not None:
        tied = sizes.share_embeddings_and_output_weights
        words = sizes.vocab_size // shards.tp
        yield Parameter(words * hidden, is_shared=tied and shards.stages > 1)
        if sizes.position_embedding_type == "learned_absolute" and sizes.seq_length:
            yield Parameter(sizes.seq_length * hidden)
    elif sizes.patch_size:
        yield Parameter(sizes.sequence * hidden)  # positions
        yield from _linear(sizes.patch_size, hidden)


def _outputs(sizes: ModuleSizes, shards: _Shards, language_hidden_size: int) -> Iterator[Parameter]:
    """A language model's output layer, or an encoder's projection."""
    if sizes.vocab_size is not None:
        tied = sizes.share_embeddings_and_output_weights
        if not (tied and shards.stages == 1):
            words = sizes.vocab_size // shards.tp
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


def stage_layers(sizes: ModuleSizes, stages: int, stage: int) -> range:
    """Indices of a stage's layers in the whole module."""
    length = sizes.num_layers // stages
    return range(stage * length, (stage + 1) * length)


def _layer(sizes: ModuleSizes, shards: _Shards, has_experts: bool) -> Iterator[Parameter]:
    hidden, tp = sizes.hidden_size, shards.tp
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


def _mixture(sizes: ModuleSizes, shards: _Shards) -> Iterator[Parameter]:
    """The router, this rank's experts and the shared expert."""
    assert sizes.num_moe_experts, "only layers with experts come here"
    tp, expert_tp, ep = shards.tp, shards.expert_tp, shards.ep
    yield from _linear(sizes.hidden_size, sizes.num_moe_experts, bias=sizes.add_bias_linear)
    reduced_apart = ep > 1 or expert_tp != tp
    expert = tuple(_mlp(sizes, sizes.moe_ffn_hidden_size // expert_tp, reduced_apart))
    yield from expert * (sizes.num_moe_experts // ep)
    if sizes.moe_shared_expert_intermediate_size:
        yield from _mlp(sizes, sizes.moe_shared_expert_intermediate_size // tp, bias=False)
