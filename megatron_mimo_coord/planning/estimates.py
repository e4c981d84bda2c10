"""Costs of a module whose seconds nobody has measured: floating-point operations from its sizes."""

from functools import cache

from attrs import evolve, frozen

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import (
    Shards,
    layers_numel,
    layers_parameters,
    shards_of,
    stage_layers,
)

LEAST_COMPUTED = 0.5
"""Part of measured seconds that ranks computed at least, however slow messages are said to be."""

OPTIMIZER_TRAFFIC = 28
"""Bytes that Adam reads and writes for each parameter: its gradient once, the parameter's master
copy and both moments twice, all in fp32."""


ASSUMPTIONS = (
    "a backward pass takes two forward passes; every shape computes at the same rate, and TP "
    "divides norms, dropout and residuals too, which ranks repeat without sequence_parallel",
    "tensor-parallel ranks wait for four sums of hidden states a layer and two of a vocabulary, "
    "experts' ranks for their tokens to come and go; nothing overlaps",
    'assign_images deals images out, which vary by images_per_sample_deviation; "in slices" is the '
    "step without it",
    "context-parallel ranks pass the keys and values of each layer around forward, and twice as "
    "much backward; each has an equal part of the attention",
    "embedding and output layer come on top of the first and the last stage",
)
"""What an estimate rests on, for a user to read."""


@frozen(kw_only=True)
class Accelerator:
    """How fast a GPU is, not at its peak but in training.

    Args:
        flops_per_second: floating-point operations, achieved.
        memory_bytes_per_second: of its memory, which bounds the optimizer.
    """

    flops_per_second: float = 400e12
    memory_bytes_per_second: float = 2e12


@cache
def forward_flops(
    sizes: ModuleSizes, language_hidden_size: int, layers: range | None = None
) -> float:
    """Floating-point operations of a sample's forward pass, or of the part in some layers.

    Two for each weight of a matrix and token, and 4 s q a token for attention over s tokens with
    queries of width q, half of that where it is causal and blocks above the diagonal are left out
    (Kaplan et al. 2020, arXiv 2001.08361, table 1; Korthikanti et al. 2022, arXiv 2205.05198,
    appendix A). What embeds patches counts to the first layer, and output or projection to the
    last.

    Example:
        >>> sizes = ModuleSizes(
        ...     num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128, seq_length=32
        ... )
        >>> forward_flops(sizes, 64), forward_flops(sizes, 64, range(1))
        (7077888.0, 3276800.0)
    """
    layers = range(sizes.num_layers) if layers is None else layers
    products = sum(each.flops for each in layers_parameters(sizes, layers, language_hidden_size))
    return sizes.tokens(1) * (products + len(layers) * _attention_flops(sizes))


def _attention_flops(sizes: ModuleSizes) -> float:
    """Operations of a layer's attention for a token."""
    is_halved = sizes.is_language and sizes.has_flash_attention
    return 4 * sizes.attended * sizes.query_size / (2 if is_halved else 1)


def estimated_costs(
    sizes: ModuleSizes,
    parallelism: ModuleParallelism,
    language_hidden_size: int,
    accelerator: Accelerator,
    cluster: Cluster,
) -> ModuleCosts:
    """Costs of a module in a layout, from its sizes; :data:`ASSUMPTIONS` says what they rest on.

    Args:
        sizes: of the module.
        parallelism: how it is laid out.
        language_hidden_size: what an encoder projects to.
        accelerator: how fast a rank computes.
        cluster: how fast ranks reach each other.
    """
    stages = stage_layers(sizes, parallelism)
    shards = shards_of(parallelism)
    cp = parallelism.context_parallel_size
    return _estimated(sizes, stages, shards, cp, language_hidden_size, accelerator, cluster)


@cache
def _estimated(
    sizes: ModuleSizes,
    stages: tuple[range, ...],
    shards: Shards,
    cp: int,
    language_hidden_size: int,
    accelerator: Accelerator,
    cluster: Cluster,
) -> ModuleCosts:
    """The same whatever the replicas are."""
    shares = [forward_flops(sizes, language_hidden_size, layers) for layers in stages]
    forward = sum(shares) / accelerator.flops_per_second
    (tp, *_), width = shards, sizes.bytes_per_number
    numel = (layers_numel(sizes, layers, language_hidden_size, shards) for layers in stages)
    parameters = tp * sum(numel)
    hidden = sizes.tokens(1) * sizes.hidden_size * width
    message = hidden
    if sizes.sequence_parallel:
        message /= tp
    computing, waiting = 3 * forward / tp, tensor_parallel_seconds(sizes, tp, cluster)
    efficiency = computing / (computing + waiting) if forward else 1.0
    alone, passing = (computing + waiting) / cp, context_parallel_seconds(sizes, tp, cp, cluster)
    exchanged = _exchange(sizes, shards, cluster) * efficiency
    output = sizes.images_per_sample * sizes.output_tokens * language_hidden_size * width
    recomputed = _recomputed(sizes) / accelerator.flops_per_second
    return ModuleCosts(
        forward_seconds_per_sample=forward + exchanged,
        backward_seconds_per_sample=2 * forward + recomputed + exchanged,
        output_bytes_per_sample=0.0 if sizes.is_language else output,
        activation_bytes_per_sample=message,
        gradient_bytes=parameters * (4 if sizes.grad_reduce_in_fp32 else width),
        optimizer_seconds=parameters * OPTIMIZER_TRAFFIC / accelerator.memory_bytes_per_second,
        tensor_parallel_efficiency=efficiency,
        context_parallel_efficiency=alone / (alone + passing) if forward else 1.0,
        frozen=sizes.frozen,
        recompute=sizes.recompute_granularity == "full",
        images_per_sample=0.0 if sizes.is_language else sizes.images_per_sample,
        images_per_sample_deviation=sizes.images_per_sample_deviation,
        images_assigned=True,
        layers_per_stage=shares if forward else None,  # without images there is no work
    )


def tensor_parallel_seconds(sizes: ModuleSizes, tp: int, cluster: Cluster) -> float:
    """Seconds in which tensor-parallel ranks sum hidden states for a sample, forward and back.

    Behind attention and MLP of each layer forward, and before them backward (Shoeybi et al. 2019,
    arXiv 1909.08053); a language model's vocabulary adds one behind the embedding, and one backward
    before the output layer.
    """
    hidden = sizes.tokens(1) * sizes.hidden_size * sizes.bytes_per_number
    sums = 4 * sizes.num_layers + (2 if sizes.is_language else 0)
    return sums * cluster.reduction_seconds(range(tp), hidden)


def context_parallel_seconds(sizes: ModuleSizes, tp: int, cp: int, cluster: Cluster) -> float:
    """Seconds in which ranks pass keys and values around for a sample, forward and back.

    In a ring each sends its part, and then what it received, to the next (Liu et al. 2023, arXiv
    2310.01889); backward the gradients of keys and values go along. Gathering sends as much.
    """
    if cp == 1:
        return 0.0
    part = sizes.tokens(1) / cp * 2 * sizes.key_size / tp * sizes.bytes_per_number
    message = cluster.message_seconds((0, tp * cp - 1), part)
    return 3 * sizes.num_layers * (cp - 1) * message


def scaled(
    measured: ModuleCosts, sizes: ModuleSizes, parallelism: ModuleParallelism, cluster: Cluster
) -> ModuleCosts:
    """Costs that were measured, for a layout with another TP or CP, or a model of longer sequences.

    What ranks computed is what was measured without what they waited for each other, and grows as
    the operations do; what they wait for in the layout comes on top. Nothing changes where all is
    as it was measured.

    Example:
        >>> sizes = ModuleSizes(num_layers=1, hidden_size=2, num_attention_heads=1, vocab_size=2)
        >>> costs = ModuleCosts(
        ...     forward_seconds_per_sample=3, backward_seconds_per_sample=5,
        ...     measured_tensor_parallel_size=2,
        ... )
        >>> cluster = Cluster(node_bytes_per_second=48)  # 6 sums of 8 bytes take 1 s over two ranks
        >>> layout = ModuleParallelism()
        >>> alone = scaled(costs, sizes, layout, cluster)
        >>> alone.forward_seconds_per_sample, alone.backward_seconds_per_sample
        (2.25, 3.75)
    """
    seconds = measured.forward_seconds_per_sample + measured.backward_seconds_per_sample
    before = measured.measured_tensor_parallel_size, measured.measured_context_parallel_size
    shards = parallelism.tensor_model_parallel_size, parallelism.context_parallel_size
    length = measured.measured_seq_length if sizes.is_language else None
    then = sizes
    if length not in (None, sizes.seq_length):
        then = evolve(sizes, seq_length=length, packed_lengths=None)
    if (before, then) == (shards, sizes) or not seconds:
        return measured
    computed = max(seconds - waiting_seconds(then, *before, cluster), LEAST_COMPUTED * seconds)
    computed *= forward_flops(sizes, sizes.hidden_size) / forward_flops(then, sizes.hidden_size)
    factor = (computed + waiting_seconds(sizes, *shards, cluster)) / seconds
    return evolve(
        measured,
        forward_seconds_per_sample=factor * measured.forward_seconds_per_sample,
        backward_seconds_per_sample=factor * measured.backward_seconds_per_sample,
        activation_bytes_per_sample=(
            measured.activation_bytes_per_sample * sizes.sequence / then.sequence
        ),
    )


def waiting_seconds(sizes: ModuleSizes, tp: int, cp: int, cluster: Cluster) -> float:
    """Seconds that ranks of a layer wait for each other for a sample, added up over them."""
    passing = context_parallel_seconds(sizes, tp, cp, cluster)
    return tp * (tensor_parallel_seconds(sizes, tp, cluster) + cp * passing)


def _exchange(sizes: ModuleSizes, shards: Shards, cluster: Cluster) -> float:
    """Seconds in which a sample's tokens go to their experts and back, times TP, one pass.

    Tensor-parallel ranks send a part of the tokens each, ``moe_router_topk`` times; one of EP
    stays.
    """
    _, expert_tp, ep = shards
    layers = sum(map(sizes.has_experts, range(sizes.num_layers)))
    if ep == 1 or not layers:
        return 0.0
    _, bandwidth = cluster.latency_and_bandwidth(range(ep * expert_tp))
    sent = sizes.tokens(1) * sizes.moe_router_topk * sizes.hidden_size * sizes.bytes_per_number
    return 2 * layers * sent * (1 - 1 / ep) / bandwidth


@cache
def _recomputed(sizes: ModuleSizes) -> float:
    """Operations that selective recomputation adds to a sample's backward pass."""
    if sizes.recompute_granularity != "selective":
        return 0.0
    added = 0.0
    for layer in range(sizes.num_layers):
        if "core_attn" in sizes.recompute_modules:
            added += _attention_flops(sizes)
        if ("moe" if sizes.has_experts(layer) else "mlp") in sizes.recompute_modules:
            every = layers_parameters(sizes, range(layer, layer + 1), sizes.hidden_size)
            added += sum(each.flops for each in every if each.of_mlp)
    return sizes.tokens(1) * added
