"""Bytes of weights, gradient buffers and optimizer state, as Megatron allocates them.

Megatron's DDP lays parameters into buffers: buckets, padding, and a shard for each rank where the
optimizer is distributed.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import (
    Parameter,
    layers_parameters,
    shards_of,
    stage_layers,
)

START = 64  # numbers that a parameter's start is aligned to
END = 128  # numbers that a bucket's end is aligned to, besides the data-parallel size
BUSBW_END = 2**16  # with pad_buckets_for_high_nccl_busbw
MOMENTS = 8  # bytes a parameter: Adam's two moments, in fp32
MASTER = 4  # bytes a parameter: its copy in fp32, where the parameter itself is not
LEAST_BUCKET, BUCKET_PER_REPLICA = 40_000_000, 1_000_000  # DistributedDataParallel's own


@cache
def model_states(
    sizes: ModuleSizes, parallelism: ModuleParallelism, stage: int, language_hidden_size: int
) -> tuple[int, int, int]:
    """Bytes of weights, gradient buffers and optimizer state of a rank of a pipeline stage.

    With the distributed optimizer weights are the buffer that they lie in, and its state is a part
    of the padded buffer, on the rank that has most.

    Args:
        sizes: of the module.
        parallelism: how it is laid out.
        stage: of the module's pipeline, from 0.
        language_hidden_size: what an encoder projects to.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> model_states(sizes, ModuleParallelism(data_parallel_size=2), 0, 64)
        (465920, 465920, 931840)
    """
    layers = stage_layers(sizes, parallelism)[stage]
    parameters = layers_parameters(sizes, layers, language_hidden_size, shards_of(parallelism))
    width = sizes.bytes_per_number
    if sizes.frozen:
        return width * sum(each.numel for each in parameters), 0, 0
    bucket_size = None  # only the first stage, whose reductions are waited for, has several
    if sizes.overlap_grad_reduce and stage == 0:
        least = max(LEAST_BUCKET, BUCKET_PER_REPLICA * parallelism.data_parallel_size)
        bucket_size = sizes.bucket_size or least
    replicas = parallelism.data_parallel_size * parallelism.context_parallel_size
    numel = optimized = 0
    for is_expert, copies in ((False, replicas), (True, parallelism.expert_shape[2])):
        chosen = [each for each in parameters if each.is_expert == is_expert]
        length = sum(each.numel for each in chosen)
        if sizes.use_distributed_optimizer:
            pad_to = BUSBW_END if sizes.pad_buckets_for_high_nccl_busbw else END
            length = padded(chosen, lcm(copies, pad_to), bucket_size)
        numel += length
        optimized += length // (copies if sizes.use_distributed_optimizer else 1)
    gradient = 4 if sizes.grad_reduce_in_fp32 else width
    state = MOMENTS + (MASTER if width < MASTER else 0)
    return width * numel, gradient * numel, state * optimized


def padded(parameters: Sequence[Parameter], align: int, bucket_size: int | None = None) -> int:
    """Numbers in the buffer of parameters whose optimizer is distributed.

    Each bucket is padded until all ranks can have an equal part of it
    (``DistributedOptimizer._compute_per_buffer_param_layout`` of Megatron-Core 0.19).

    Args:
        parameters: in the order in which they are registered.
        align: what divides the length of a bucket.
        bucket_size: numbers after which a bucket is full; None for one bucket.

    Example:
        >>> padded([Parameter(100), Parameter(10)], 128)
        256
    """
    return sum(-(-end // align) * align for end in _buckets(parameters, bucket_size))


def _buckets(parameters: Sequence[Parameter], bucket_size: int | None) -> Iterator[int]:
    """Where the last parameter of each bucket ends in it.

    Those registered last come first; a shared embedding has a bucket of its own.
    """
    end = 0
    for parameter in reversed(parameters):
        if parameter.is_shared and end:
            yield end
            end = 0
        end = -(-end // START) * START + parameter.numel
        if parameter.is_shared or (bucket_size is not None and end >= bucket_size):
            yield end
            end = 0
    if end:
        yield end
