"""How Megatron's DDP lays parameters into one buffer: buckets, padding and optimizer shards."""

from collections.abc import Iterator, Sequence
from math import lcm

from attrs import frozen

from megatron_mimo_coord.planning.parameters import Parameter

START = 64  # numbers that a parameter's start is aligned to
END = 128  # numbers that a bucket's end is aligned to, besides the data-parallel size
BUSBW_END = 2**16  # with pad_buckets_for_high_nccl_busbw


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
