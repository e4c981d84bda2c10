"""Costs of a module whose seconds nobody has measured: floating-point operations from its sizes."""

from functools import cache
from math import prod

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

MOST_WAITED = 0.5
"""Part of measured seconds that ranks waited at most: else messages were faster than is said."""

OPTIMIZER_TRAFFIC = 28
"""Bytes that Adam reads and writes for each parameter: its gradient once, the parameter's master
copy and both moments twice, all in fp32."""

NORM, RESIDUAL = 2, 3
"""Hidden states that a norm, and dropout with its residual, read and write. A layer has two of
each, whose bytes are what they take: for Korthikanti et al. (2022, arXiv 2205.05198, table 4), 22B
on A100s, TP 8 takes 0.44 ms longer forward without sequence parallelism, and 0.5 ms is measured."""

ASSUMPTIONS = (
    "a backward pass takes two forward passes; every shape computes at the same rate; of that, "
    "norms, dropout and residuals, which TP ranks repeat without sequence_parallel, have what "
    "memory takes for their bytes",
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
    per_sample, per_microbatch = waiting_seconds(sizes, tp, cp, cluster)
    output = sizes.images_per_sample * sizes.output_tokens * language_hidden_size * width
    repeated = 0.0 if sizes.sequence_parallel else 2 * (NORM + RESIDUAL) * sizes.num_layers * hidden
    repeated /= accelerator.memory_bytes_per_second
    return ModuleCosts(
        forward_seconds_per_sample=forward,
        backward_seconds_per_sample=2 * forward + recomputed_seconds(sizes, accelerator),
        output_bytes_per_sample=0.0 if sizes.is_language else output,
        activation_bytes_per_sample=message,
        gradient_bytes=parameters * (4 if sizes.grad_reduce_in_fp32 else width),
        optimizer_seconds=parameters * OPTIMIZER_TRAFFIC / accelerator.memory_bytes_per_second,
        tensor_parallel_replicated_share=min(1.0, repeated / forward) if forward else 0.0,
        waiting_seconds_per_sample=per_sample + _exchange(sizes, shards, cp, cluster),
        waiting_seconds_per_microbatch=per_microbatch,
        frozen=sizes.frozen,
        recompute=sizes.recompute_granularity == "full",
        images_per_sample=0.0 if sizes.is_language else sizes.images_per_sample,
        images_per_sample_deviation=sizes.images_per_sample_deviation,
        images_assigned=True,
        layers_per_stage=shares if forward else None,  # without images there is no work
    )


def waiting_seconds(sizes: ModuleSizes, tp: int, cp: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds that a rank waits in messages of TP and CP, forward and back: bytes, and latency.

    Tensor-parallel ranks sum hidden states behind attention and MLP of each layer forward, and
    before them backward (Shoeybi et al. 2019, arXiv 1909.08053); a language model's vocabulary adds
    one sum behind the embedding, and one backward before the output layer. Context-parallel ranks
    pass keys and values around: in a ring each sends its part, and then what it received, to the
    next (Liu et al. 2023, arXiv 2310.01889), and backward the gradients along; gathering sends as
    much.

    Returns:
        (for a sample of the rank's replica, for a microbatch of whatever size)
    """
    tokens = sizes.tokens(1) / cp * sizes.bytes_per_number
    if not tokens:
        return 0.0, 0.0
    hops = 2 * (tp - 1) * (4 * sizes.num_layers + (2 if sizes.is_language else 0))
    latency, bandwidth = cluster.latency_and_bandwidth(range(tp))
    passed = 3 * (cp - 1) * sizes.num_layers
    far_latency, far_bandwidth = cluster.latency_and_bandwidth((0, tp * cp - 1))
    sums = hops * tokens * sizes.hidden_size / tp / bandwidth
    ring = passed * tokens * 2 * sizes.key_size / tp / far_bandwidth
    return sums + ring, hops * latency + passed * far_latency


def scaled(
    measured: ModuleCosts, sizes: ModuleSizes, tp: int, cp: int, cluster: Cluster
) -> ModuleCosts:
    """Costs that were measured, for a layout with another TP or CP, or a model of longer sequences.

    What ranks computed is what was measured without what they waited for each other and what TP
    ranks repeated, and grows as the operations do; what they wait for in the layout comes on top.
    Nothing changes where all is as it was measured.

    Example:
        >>> sizes = ModuleSizes(num_layers=1, hidden_size=2, num_attention_heads=1, vocab_size=2)
        >>> costs = ModuleCosts(
        ...     forward_seconds_per_sample=3, backward_seconds_per_sample=5,
        ...     measured_tensor_parallel_size=2,
        ... )
        >>> cluster = Cluster(node_bytes_per_second=48)  # 6 sums of 8 bytes take 1 s over two ranks
        >>> alone = scaled(costs, sizes, 1, 1, cluster)
        >>> alone.forward_seconds_per_sample, alone.backward_seconds_per_sample
        (2.25, 3.75)
    """
    forward, backward = measured.forward_seconds_per_sample, measured.backward_seconds_per_sample
    seconds = forward + backward * (measured.activation_gradient_share if measured.frozen else 1)
    length, then, growth = measured.measured_seq_length if sizes.is_language else None, sizes, 1.0
    if length not in (None, sizes.seq_length):
        then, hidden = evolve(sizes, seq_length=length, packed_lengths=None), sizes.hidden_size
        growth = forward_flops(sizes, hidden) / forward_flops(then, hidden)
    before = measured.measured_tensor_parallel_size, measured.measured_context_parallel_size
    per_sample, per_microbatch = waiting_seconds(then, *before, cluster)
    waited = prod(before) * (per_sample + per_microbatch / (measured.measured_samples or 1))
    waited /= 1 if backward else 2
    part = min(MOST_WAITED, waited / seconds) if seconds else 0.0
    of_links = part * seconds / waited if waited else 1.0
    computed = growth * (1 - part)
    computed /= 1 + (before[0] - 1) * measured.tensor_parallel_replicated_share
    per_sample, per_microbatch = waiting_seconds(sizes, tp, cp, cluster)
    return evolve(
        measured,
        forward_seconds_per_sample=computed * forward,
        backward_seconds_per_sample=computed * backward,
        waiting_seconds_per_sample=of_links * per_sample,
        waiting_seconds_per_microbatch=of_links * per_microbatch,
        activation_bytes_per_sample=(
            measured.activation_bytes_per_sample * sizes.sequence / then.sequence
        ),
    )


def _exchange(sizes: ModuleSizes, shards: Shards, cp: int, cluster: Cluster) -> float:
    """Seconds in which a rank's tokens of a sample go to their experts and back, in both passes.

    Tensor-parallel ranks send a part of the tokens each, ``moe_router_topk`` times; one of EP
    stays.
    """
    tp, expert_tp, ep = shards
    layers = sum(map(sizes.has_experts, range(sizes.num_layers)))
    if ep == 1 or not layers:
        return 0.0
    _, bandwidth = cluster.latency_and_bandwidth(range(ep * expert_tp))
    sent = sizes.tokens(1) * sizes.moe_router_topk * sizes.hidden_size * sizes.bytes_per_number
    return 4 * layers * sent / tp / cp * (1 - 1 / ep) / bandwidth


@cache
def recomputed_seconds(sizes: ModuleSizes, accelerator: Accelerator) -> float:
    """Seconds that selective recomputation adds to a sample's backward pass."""
    if sizes.recompute_granularity != "selective":
        return 0.0
    added = moved = 0.0
    for layer in range(sizes.num_layers):
        if "core_attn" in sizes.recompute_modules:
            added += _attention_flops(sizes)
        if "layernorm" in sizes.recompute_modules:
            moved += 2 * NORM * sizes.hidden_size * sizes.bytes_per_number
        if ("moe" if sizes.has_experts(layer) else "mlp") in sizes.recompute_modules:
            every = layers_parameters(sizes, range(layer, layer + 1), sizes.hidden_size)
            added += sum(each.flops for each in every if each.of_mlp)
    seconds = added / accelerator.flops_per_second + moved / accelerator.memory_bytes_per_second
    return sizes.tokens(1) * seconds
