"""How Megatron's DDP lays gradients out: buffers, cut into buckets, reduced whole or in shards."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


def grad_buffers(ddp: DistributedDataParallel) -> list[Any]:
    """The gradient buffers of a module, dense and expert."""
    return [*ddp.buffers, *ddp.expert_parallel_buffers]


def owns_its_gradients(ddp: DistributedDataParallel) -> bool:
    """Whether backward adds to the buffers of this DDP, and not to those of one around it."""
    own = [
        grads
        for buffer in grad_buffers(ddp)
        for grads in (buffer.grad_data, *getattr(buffer, "extra_main_grads", ()))
    ]
    storages = {grads.untyped_storage().data_ptr() for grads in own}
    return all(
        param.main_grad.untyped_storage().data_ptr() in storages for param in ddp.params_with_grad
    )


def buckets(ddp: DistributedDataParallel) -> Iterator[Any]:
    """Each bucket, dense and expert."""
    for _, bucket, _ in _grouped(ddp):
        yield bucket


def shards(ddp: DistributedDataParallel) -> Iterator[torch.Tensor]:
    """The parts of the gradient buffers that hold reduced gradients on this rank."""
    for group, bucket, _ in _grouped(ddp):
        if ddp.ddp_config.use_distributed_optimizer:
            start, end = _shard(group, bucket)
            yield bucket.grad_data[start:end]
        else:
            yield bucket.grad_data


def disjoint_parts(
    ddp: DistributedDataParallel, counts: Callable[[torch.nn.Parameter], bool]
) -> Iterator[torch.Tensor]:
    """The reduced gradients dealt out to all replicas, each element to one of them.

    Args:
        ddp: the module.
        counts: which parameters are asked for.
    """
    for group, bucket, process_group in _grouped(ddp):
        if ddp.ddp_config.num_distributed_optimizer_instances > 1:
            instances = group.inter_distributed_optimizer_instance_group
            start, end = _own_part(*_shard(group, bucket), instances)
        elif ddp.ddp_config.use_distributed_optimizer:
            start, end = _shard(group, bucket)
        else:
            start, end = _own_part(0, len(bucket.grad_data), process_group)
        for param in filter(counts, bucket.params_list):
            first, last = bucket.param_to_index[param]
            if max(first, start) < min(last, end):
                yield bucket.grad_data[max(first, start) : min(last, end)]


def _grouped(ddp: DistributedDataParallel) -> Iterator[tuple[Any, Any, Any]]:
    """(bucket group, bucket, process group) of every bucket."""
    for groups, process_group in (
        (ddp.bucket_groups, ddp.dp_cp_group),
        (ddp.expert_parallel_bucket_groups, ddp.expt_dp_group),
    ):
        for group in groups:
            for bucket in group.buckets:
                yield group, bucket, process_group


def _shard(group: Any, bucket: Any) -> tuple[int, int]:
    """The part of a bucket that the distributed optimizer of this rank reduces."""
    return _own_part(0, len(bucket.grad_data), group.intra_distributed_optimizer_instance_group)


def _own_part(start: int, end: int, process_group: Any) -> tuple[int, int]:
    """This rank's part of an interval that a group divides among its ranks."""
    rank, size = process_group.rank(), process_group.size()
    length = end - start
    return start + length * rank // size, start + length * (rank + 1) // size


def gradient_bytes(ddp: DistributedDataParallel) -> tuple[float, float]:
    """Bytes of a module's dense gradients, and of its experts' divided by an expert's replicas."""

    def size(buffers: Iterable[Any]) -> int:
        grads = [buffer.grad_data for buffer in buffers]
        return sum(grad.numel() * grad.element_size() for grad in grads)

    experts = size(ddp.expert_parallel_buffers)
    return size(ddp.buffers), experts / ddp.expt_dp_group.size()
