"""When each module's gradients are reduced: in one order on every rank, whatever its data holds.

Megatron's DDP launches the reduction of a bucket group from backward, as soon as every parameter of
the group has its gradient. A rank whose last microbatch holds no image never gets there: nothing is
launched, ``finish_grad_sync`` asserts, and the peers wait for ever. Launching what is missing once
backward is over mends that only if all ranks launch in the same order: the order of backward (which
such a rank never sees) is not the order of the list. So here every launch follows the list: a group
that is ready early is held until those before it are launched.

With ``overlap_param_gather`` it is the same with parameters: Megatron gathers them from forward,
which a rank without an image does not run. Here every rank launches the gathers as a step begins.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel


class OrderedReduction:
    """The gradient reductions of one module.

    Args:
        ddp: the module. Its bucket groups' ``start_grad_sync`` is routed through this object.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        self._gathers = bool(ddp.ddp_config.overlap_param_gather)
        self.overlaps = bool(ddp.ddp_config.overlap_grad_reduce)
        self._groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]
        self._queues = (
            [_LaunchQueue(ddp.bucket_groups), _LaunchQueue(ddp.expert_parallel_bucket_groups)]
            if self.overlaps
            else []
        )

        for group in self._groups if self._gathers else ():
            group.next_param_gather_bucket_group = None  # launched with all others, not in a chain

    @classmethod
    def of(cls, ddp: DistributedDataParallel) -> "OrderedReduction":
        """The one of this module, whoever asked for it first."""
        if not hasattr(ddp, "_mimo_ordered_reduction"):
            ddp._mimo_ordered_reduction = cls(ddp)
        return ddp._mimo_ordered_reduction

    def begin(self) -> None:
        """Forget the launches of a step that an exception cut short; gather the parameters."""
        for group in self._groups:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()
                group.grad_reduce_handle = None
        for queue in self._queues:
            queue.reset()
        self.gather_params()

    def gather_params(self) -> None:
        """Launch the gathering of parameters that forward waits for, in the order of forward."""
        for group in reversed(self._groups) if self._gathers else ():
            if not group.param_gather_dispatched:
                group.start_param_sync()

    def gather_params_now(self) -> None:
        """Wait until this rank's parameters are those of the last update, which come late.

        Megatron gathers them once a step, from the first forward after ``zero_grad_buffer``; who
        reads them before sees those of other replicas as they were. Collective in the module.
        """
        if self._gathers:
            with torch.no_grad():
                self._ddp.start_param_sync(force_sync=True)

    def launch(self) -> None:
        """Launch every reduction that backward did not; collect parameters that it did not use."""
        for group in self._groups if self._gathers else ():
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)
        for queue in self._queues:
            queue.launch_rest(self._ddp.force_all_reduce)

    def end(self, force_all_reduce: bool) -> None:
        """Called when all reductions are done: get ready for the next step."""
        for queue in self._queues:
            queue.reset()
        if self.overlaps:
            self._forget_partial_counts()
        if force_all_reduce and self._only_shards_reduced:
            self._gather_shards()

    @property
    def _only_shards_reduced(self) -> bool:
        """Overlapped launches happen before anyone knows of the caller's ``force_all_reduce``."""
        return (
            self.overlaps
            and self._ddp.ddp_config.use_distributed_optimizer
            and not self._ddp.force_all_reduce
        )

    def reduces_everything(self, force_all_reduce: bool) -> bool:
        """Whether whole buckets are reduced, and not only this rank's shards of them."""
        if not self._ddp.ddp_config.use_distributed_optimizer:
            return True
        return bool(self._ddp.force_all_reduce if self.overlaps else force_all_reduce)

    def _forget_partial_counts(self) -> None:
        """Megatron counts in the first batch how often each gradient becomes ready.

        A batch that left a parameter out (a pipeline stage that skips it, a modality that was not
        there) is no measure for the next ones, and Megatron would assert on it.
        """
        for group in self._groups:
            if group.is_first_batch and len(group.per_param_grad_ready_counts) < len(group.params):
                group.per_param_grad_ready_counts = {}

    def _gather_shards(self) -> None:
        for group in self._groups:
            rank = group.intra_distributed_optimizer_instance_rank
            size = group.intra_distributed_optimizer_instance_size
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(size)[rank].clone()
                dist.all_gather_into_tensor(
                    bucket.grad_data, shard, group=group.intra_distributed_optimizer_instance_group
                )


class _LaunchQueue:
    """Bucket groups that share a process group, launched in the order of the list."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups
        self._launchers = [MethodType(type(group).start_grad_sync, group) for group in groups]
        for index, group in enumerate(groups):
            group.start_grad_sync = self._request_of(index)
        self.reset()

    def reset(self) -> None:
        self._launched = 0
        self._held: dict[int, bool | None] = {}

    def launch_rest(self, force_all_reduce: bool) -> None:
        for index in range(self._launched, len(self._launchers)):
            self._request(index, force_all_reduce)

    def _request_of(self, index: int) -> Callable[..., None]:
        def start_grad_sync(force_all_reduce: bool | None = False) -> None:
            self._request(index, force_all_reduce)

        return start_grad_sync

    def _request(self, index: int, force_all_reduce: bool | None) -> None:
        """Launch a group when its turn comes; one that is launched already stays launched."""
        if index < self._launched and self._is_reset(self._groups[index]):
            self.reset()  # a new step, of which only DDP was told
        self._held[index] = force_all_reduce
        while self._launched in self._held:
            launched = self._launched
            self._launched += 1
            self._launchers[launched](force_all_reduce=self._held.pop(launched))

    @staticmethod
    def _is_reset(group: Any) -> bool:
        """Whether Megatron holds no reduction of this group (it keeps no handle of instances)."""
        return (
            group.ddp_config.num_distributed_optimizer_instances == 1
            and group.grad_reduce_handle is None
            and not group.grad_reduce_finished
        )
