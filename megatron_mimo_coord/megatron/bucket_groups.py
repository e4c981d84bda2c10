"""Megatron's bucket groups: gradients that one launch reduces, parameters that another gathers.

Leans on a group's reduction (``start_grad_sync``) being launched once every parameter of
it was ready as often as in the first batch, on its handles, and with the distributed optimizer on
its shards. Without these no gradient can be reduced in one order, and ranks wait for ever.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_mimo_coord.megatron.changes import Changes


class BucketGroup:
    """Buckets that one launch reduces, and whose parameters another gathers."""

    def __init__(
        self, group: Any, settings: DistributedDataParallelConfig, replicas: dist.ProcessGroup
    ) -> None:
        self.params: list[torch.nn.Parameter] = list(group.params)
        self._group = group
        self._settings = settings
        self._replicas = replicas

    # -- reductions --------------------------------------------------------------------------------

    def route_reduction(self, launch: Callable[..., None], changes: Changes) -> None:
        """Have ``launch(force_all_reduce=False)`` called where DDP would launch the reduction."""
        changes.set(self._group, "start_grad_sync", launch)

    def reduce(self, force_all_reduce: bool | None) -> None:
        """Launch the reduction, of whole buckets or of this rank's shards."""
        type(self._group).start_grad_sync(self._group, force_all_reduce=force_all_reduce)

    def abandon(self) -> None:
        """Wait for a reduction of which nobody will ask any more: it writes until it ends."""
        if self._group.grad_reduce_handle is not None:
            self._group.grad_reduce_handle.wait()
            self._group.grad_reduce_handle = None

    def forget_partial_counts(self) -> None:
        """Have the next batch counted as the first one, if this one left a parameter out.

        Megatron counts in the first batch how often each gradient becomes ready. One without a
        modality, or of a pipeline stage that skips a parameter, is no measure for the next ones.
        """
        group = self._group
        if group.is_first_batch and len(group.per_param_grad_ready_counts) < len(group.params):
            group.per_param_grad_ready_counts = {}

    def gather_shards(self) -> None:
        """Have every rank hold what each has reduced."""
        shards = self._group.intra_distributed_optimizer_instance_group
        for bucket in self._group.buckets:
            shard = bucket.grad_data.chunk(shards.size())[shards.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=shards)

    # -- parameters --------------------------------------------------------------------------------

    def unchain_gather(self, changes: Changes) -> None:
        """Have a gather not launch the next one, when forward waits for it."""
        changes.set(self._group, "next_param_gather_bucket_group", None)

    def gather(self) -> None:
        """Launch the gather, unless it is launched."""
        if not self._group.param_gather_dispatched:
            self._group.start_param_sync()

    def finish_gather(self) -> None:
        """Wait for the gather, if nobody has."""
        if self._group.param_gather_handle is not None:
            self._group.finish_param_sync(skip_next_bucket_dispatch=True)

    # -- buckets -----------------------------------------------------------------------------------

    @property
    def buckets(self) -> list[Any]:
        """Megatron's."""
        return list(self._group.buckets)

    def own_part(self, bucket: Any) -> tuple[int, int]:
        """The interval of a bucket that is this replica's, if they share it among them."""
        if not self._settings.use_distributed_optimizer:
            return _part(0, len(bucket.grad_data), self._replicas)
        start, end = self.shard(bucket)
        if self._settings.num_distributed_optimizer_instances > 1:
            return _part(start, end, self._group.inter_distributed_optimizer_instance_group)
        return start, end

    def shard(self, bucket: Any) -> tuple[int, int]:
        """The interval of a bucket that holds reduced gradients on this rank."""
        length = len(bucket.grad_data)
        if not self._settings.use_distributed_optimizer:
            return 0, length
        return _part(0, length, self._group.intra_distributed_optimizer_instance_group)


def _part(start: int, end: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """This rank's part of an interval that a group divides among its ranks."""
    rank, size = group.rank(), group.size()
    length = end - start
    return start + length * rank // size, start + length * (rank + 1) // size
