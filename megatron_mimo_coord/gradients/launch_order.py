"""When gradients are reduced: in one order on every rank, whatever its data holds.

Megatron's DDP launches the reduction of a bucket group from backward, as soon as every parameter of
the group has its gradient. A rank whose last microbatch holds no image never gets there: nothing is
launched, ``finish_grad_sync`` asserts, and the peers wait for ever. Launching what is missing once
backward is over mends that only if all ranks launch in the same order, which NCCL requires of ranks
that share several process groups. So here every launch follows one list of dense and expert bucket
groups: one that is ready early is held until those before it are launched.

The list is the order of backward where every rank has images, so that next to nothing is held
there: backward reaches parameters in the reverse of the order in which forward used them.
Megatron's own list goes through one buffer after another, and the last group of each buffer waits
for the first parameter of the module.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

_SHARED = "_mimo_ordered_reduction"
"""Attribute of a DDP: the reduction that all coordinators of it share."""


class OrderedReduction:
    """The gradient reductions of modules that lie on the same ranks.

    Args:
        ddps: the modules, in the order in which backward reaches them. The ``start_grad_sync`` and
            ``reset`` of their bucket groups are routed through this object.
    """

    def __init__(self, ddps: Sequence[DistributedDataParallel]) -> None:
        self._ddps = ddps
        groups = [(ddp, group) for ddp in ddps for group in in_order_of_backward(ddp)]
        self._overlapped = [pair for pair in groups if pair[0].ddp_config.overlap_grad_reduce]
        for index, (_, group) in enumerate(self._overlapped):
            group.start_grad_sync = partial(self._request, index)
            group.reset = partial(self._reset_group, group)
        self._forget_launches()

    @classmethod
    def shared(cls, ddps: Sequence[DistributedDataParallel]) -> "OrderedReduction":
        """The one of these modules, made when it is first asked for."""
        reduction: OrderedReduction | None = getattr(ddps[0], _SHARED, None)
        if reduction is None or list(reduction._ddps) != list(ddps):
            reduction = cls(ddps)
            setattr(ddps[0], _SHARED, reduction)
        return reduction

    def abandon(self) -> None:
        """Forget the launches of a step that an exception cut short, which write until they end."""
        for _, group in self._overlapped:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()
                group.grad_reduce_handle = None
        self._forget_launches()

    def launch(self) -> None:
        """Launch every reduction that backward did not."""
        for index, (ddp, _) in enumerate(self._overlapped):
            self._request(index, ddp.force_all_reduce)

    def end(self, force_all_reduce: bool) -> None:
        """Called when all reductions are done: get ready for the next step."""
        self._forget_launches()
        self._forget_partial_counts()
        for ddp in self._ddps:
            if force_all_reduce and not reduces_everything(ddp, force_all_reduce):
                _gather_shards(ddp)

    # -- the order ---------------------------------------------------------------------------------

    def _request(self, index: int, force_all_reduce: bool | None = False) -> None:
        """Launch a group when its turn comes; one that is launched already stays launched."""
        self._held[index] = force_all_reduce
        while self._launched in self._held:
            _, group = self._overlapped[self._launched]
            force_all_reduce = self._held[self._launched]
            self._launched += 1
            type(group).start_grad_sync(group, force_all_reduce=force_all_reduce)

    def _reset_group(self, group: Any) -> None:
        """DDP zeroes its gradients: a new step, of which perhaps nobody else tells."""
        self._forget_launches()
        type(group).reset(group)

    def _forget_launches(self) -> None:
        self._launched = 0
        self._held: dict[int, bool | None] = {}

    def _forget_partial_counts(self) -> None:
        """Megatron counts in the first batch how often each gradient becomes ready.

        A batch that left a parameter out (a pipeline stage that skips it, a modality that was not
        there) is no measure for the next ones, and Megatron would assert on it.
        """
        for _, group in self._overlapped:
            if group.is_first_batch and len(group.per_param_grad_ready_counts) < len(group.params):
                group.per_param_grad_ready_counts = {}


def reduces_everything(ddp: DistributedDataParallel, force_all_reduce: bool) -> bool:
    """Whether whole buckets are reduced, and not only this rank's shards of them.

    Overlapped reductions are launched before anyone knows of the caller's ``force_all_reduce``.
    """
    if not ddp.ddp_config.use_distributed_optimizer:
        return True
    return bool(ddp.force_all_reduce if ddp.ddp_config.overlap_grad_reduce else force_all_reduce)


def in_order_of_backward(ddp: DistributedDataParallel) -> list[Any]:
    """Bucket groups, dense and expert, in the order in which backward completes them.

    A group is complete when backward has reached that of its parameters which forward used first.
    """
    position: dict[torch.nn.Parameter, int] = {}
    for param in _in_order_of_forward(ddp.module):
        position.setdefault(param, len(position))
    groups = ddp.bucket_groups + ddp.expert_parallel_bucket_groups
    return sorted(groups, key=lambda group: -min(position[param] for param in group.params))


def _in_order_of_forward(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Parameters as they were registered, but a module's own behind those of its first child.

    PyTorch lists a module's own parameters first. Positions and class tokens are added to what the
    first child makes of the input.
    """
    own = list(module.parameters(recurse=False))
    for child in module.children():
        of_child = list(_in_order_of_forward(child))
        yield from of_child
        if of_child:
            yield from own
            own = []
    yield from own


def _gather_shards(ddp: DistributedDataParallel) -> None:
    """Have every rank hold what each has reduced."""
    for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
        rank = group.intra_distributed_optimizer_instance_rank
        size = group.intra_distributed_optimizer_instance_size
        for bucket in group.buckets:
            shard = bucket.grad_data.chunk(size)[rank].clone()
            dist.all_gather_into_tensor(
                bucket.grad_data, shard, group=group.intra_distributed_optimizer_instance_group
            )
