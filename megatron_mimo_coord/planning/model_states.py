"""Bytes of weights, gradient buffers and optimizer state, as Megatron allocates them.

Megatron's DDP lays parameters into buffers: buckets, padding, and a shard for each rank where the
optimizer is distributed.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm

from attrs import frozen

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import Parameter, stage_parameters

START = 64  # numbers that a parameter's start is aligned to
END = 128  # numbers that a bucket's end is aligned to, besides the data-parallel size
BUSBW_END = 2**16  # with pad_buckets_for_high_nccl_busbw
MOMENTS = 8  # bytes a parameter: Adam's two moments, in fp32
MASTER = 4  # bytes a parameter: its copy in fp32, where the parameter itself is not
LEAST_BUCKET, BUCKET_PER_REPLICA = 40_000_000, 1_000_000  # DistributedDataParallel's own


@frozen
class ModelStates:
    """What a rank holds whatever the batch is, in bytes.

    Args:
        weights: parameters; with the distributed optimizer, the buffer they lie in.
        gradients: buffers of gradients.
        optimizer: moments and master copies, of each rank of the stage in order.
    """

    weights: int
    gradients: int
    optimizer: tuple[int, ...]


@cache
def model_states(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, language_hidden_size: int
) -> ModelStates:
    """Weights, gradient buffers and optimizer state of a rank of a pipeline stage.

    Args:
        sizes: of the module.
        parallelism: how it is laid out.
        stage: of the module's pipeline, from 0.
        language_hidden_size: what an encoder projects to.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> model_states(sizes, ModuleParallelism(data_parallel_size=2), 0, 64)
        ModelStates(weights=465920, gradients=465920, optimizer=(931840, 931840))
    """
    parameters = stage_parameters(sizes, parallelism, stage, language_hidden_size)
    width = sizes.bytes_per_number
    if sizes.frozen:
        weights = width * sum(each.numel for each in parameters)
        return ModelStates(weights, 0, (0,) * _stage_ranks(parallelism))
    numel, kept = 0, _optimizer_bytes(sizes)
    optimizer = [0] * _stage_ranks(parallelism)
    for is_expert in (False, True):
        chosen = [each for each in parameters if each.is_expert == is_expert]
        replicas = _replicas(parallelism, is_expert)
        buffer = lay_out(
            chosen,
            replicas,
            is_distributed=sizes.use_distributed_optimizer,
            bucket_size=_bucket_size(sizes, parallelism, stage),
            pad_for_busbw=sizes.pad_buckets_for_high_nccl_busbw,
        )
        numel += buffer.numel
        for rank in range(len(optimizer)):
            optimizer[rank] += kept * buffer.shards[rank * replicas // len(optimizer)]
    return ModelStates(
        weights=width * numel,
        gradients=(4 if sizes.grad_reduce_in_fp32 else width) * numel,
        optimizer=tuple(optimizer),
    )


def _optimizer_bytes(sizes: ModuleSizes) -> int:
    """Bytes of optimizer state for a parameter."""
    return MOMENTS + (MASTER if sizes.bytes_per_number < MASTER else 0)


def _stage_ranks(parallelism: ModuleParallelism) -> int:
    return parallelism.size // parallelism.pipeline_model_parallel_size


def _replicas(parallelism: ModuleParallelism, is_expert: bool) -> int:
    """Ranks that hold the same parameters; those that differ in the replica's index follow on."""
    if is_expert:
        return parallelism.expert_shape[2]
    return parallelism.data_parallel_size * parallelism.context_parallel_size


def _bucket_size(sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int) -> int | None:
    """Only the first stage, whose reductions are waited for, has more than one bucket."""
    if not sizes.overlap_grad_reduce or stage > 0:
        return None
    least = max(LEAST_BUCKET, BUCKET_PER_REPLICA * parallelism.data_parallel_size)
    return sizes.bucket_size or least


@frozen
class Buffer:
    """A buffer of gradients, and of parameters if the optimizer is distributed.

    Args:
        numel: numbers in it, padding included.
        shards: numbers of parameters, without padding, that each data-parallel rank optimizes.
    """

    numel: int
    shards: Sequence[int]


def lay_out(
    parameters: Sequence[Parameter],
    replicas: int,
    *,
    is_distributed: bool,
    bucket_size: int | None = None,
    pad_for_busbw: bool = False,
) -> Buffer:
    """The buffer of parameters that are reduced over ``replicas`` ranks.

    With the distributed optimizer each bucket is padded until all ranks can have an equal part of
    it, and each rank optimizes its part (``DistributedOptimizer._compute_per_buffer_param_layout``
    of Megatron-Core 0.19). Without, nothing is padded and every rank optimizes everything.

    Args:
        parameters: in the order in which they are registered.
        replicas: data-parallel ranks.
        is_distributed: whether the optimizer is.
        bucket_size: numbers after which a bucket is full; None for one bucket.
        pad_for_busbw: ``pad_buckets_for_high_nccl_busbw``.

    Example:
        >>> lay_out([Parameter(100), Parameter(10)], 2, is_distributed=True)
        Buffer(numel=256, shards=[74, 36])
        >>> lay_out([Parameter(100), Parameter(10)], 2, is_distributed=False)
        Buffer(numel=110, shards=[110, 110])
    """
    if not is_distributed:
        total = sum(parameter.numel for parameter in parameters)
        return Buffer(total, [total] * replicas)
    numel, shards = 0, [0] * replicas
    align = lcm(replicas, END, BUSBW_END if pad_for_busbw else 1)
    for places in _buckets(parameters, bucket_size):
        length = -(-places[-1][1] // align) * align
        _share(places, length // replicas, shards)
        numel += length
    return Buffer(numel, shards)


def _buckets(
    parameters: Sequence[Parameter], bucket_size: int | None
) -> Iterator[list[tuple[int, int]]]:
    """Where the parameters of each bucket begin and end in it.

    Those registered last come first; a shared embedding has a bucket of its own.
    """
    places: list[tuple[int, int]] = []
    end = 0
    for parameter in reversed(parameters):
        if parameter.is_shared and places:
            yield places
            places, end = [], 0
        first = -(-end // START) * START
        end = first + parameter.numel
        places.append((first, end))
        if parameter.is_shared or (bucket_size is not None and end >= bucket_size):
            yield places
            places, end = [], 0
    if places:
        yield places


def _share(places: Sequence[tuple[int, int]], part: int, shards: list[int]) -> None:
    """Add to each rank the numbers of parameters that lie in its part of a bucket."""
    for first, end in places:
        while first < end:
            rank = first // part
            last = min(end, (rank + 1) * part)
            shards[rank] += last - first
            first = last
