"""When gradients are reduced and parameters gathered: in one order on every rank.

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

With ``overlap_param_gather`` Megatron gathers updated parameters from forward, which a rank without
an image does not run either. Here every rank launches all gathers as a step begins, in the order in
which forward waits for them.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from megatron_mimo_coord.megatron.bucket_groups import BucketGroup
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp


class OrderedLaunches:
    """The reductions and gathers of modules that lie on the same ranks.

    Args:
        ddps: the modules, in the order in which they are reduced.
        changes: where is recorded that their launches are routed through this object.
    """

    def __init__(self, ddps: Sequence[ModuleDdp], changes: Changes) -> None:
        self._ddps = ddps
        groups = [(ddp, group) for ddp in ddps for group in in_order_of_backward(ddp)]
        self._reductions = [pair for pair in groups if pair[0].settings.overlap_grad_reduce]
        self._gathers = [pair for pair in groups[::-1] if pair[0].settings.overlap_param_gather]
        for index, (_, group) in enumerate(self._reductions):
            group.route_reduction(partial(self._request, index), changes)
        for _, group in self._gathers:
            group.unchain_gather(changes)
        self._forget_launches()

    # -- reductions --------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Forget the reductions of a step that an exception cut short."""
        for _, group in self._reductions:
            group.abandon()
        self._forget_launches()

    def reduce(self) -> None:
        """Launch every overlapped reduction that backward did not."""
        for index, (ddp, _) in enumerate(self._reductions):
            self._request(index, ddp.forces_all_reduce)

    def end(self, force_all_reduce: bool) -> None:
        """Called when all reductions are done: get ready for the next step."""
        self._forget_launches()
        for _, group in self._reductions:
            group.forget_partial_counts()
        for ddp in self._ddps:
            if force_all_reduce and not ddp.reduces_everything(force_all_reduce):
                for group in ddp.groups:
                    group.gather_shards()

    def _forget_launches(self) -> None:
        self._launched = 0
        self._held: dict[int, bool | None] = {}

    def _request(self, index: int, force_all_reduce: bool | None = False) -> None:
        """Launch a group when its turn comes; one that is launched already stays launched."""
        self._held[index] = force_all_reduce
        while self._launched in self._held:
            _, group = self._reductions[self._launched]
            force_all_reduce = self._held[self._launched]
            self._launched += 1
            group.reduce(force_all_reduce)

    # -- gathers -----------------------------------------------------------------------------------

    def gather(self) -> None:
        """Launch the gathers that forward waits for."""
        for ddp, group in self._gathers:
            if ddp.waits_in_forward:
                group.gather()

    def finish_gathers(self) -> None:
        """Wait for the gathers that this step's forward did not wait for."""
        for _, group in self._gathers:
            group.finish_gather()

    def gather_now(self) -> None:
        """Wait until this rank's parameters are those of the last update, which come late.

        Megatron gathers them once a step, from the first forward after ``zero_grad_buffer``; who
        reads them before sees those of other replicas as they were. Collective in the module.
        """
        for ddp in self._ddps:
            if ddp.settings.overlap_param_gather:
                ddp.gather_now()


def in_order_of_backward(ddp: ModuleDdp) -> list[BucketGroup]:
    """Bucket groups, dense and expert, in the order in which backward completes them.

    A group is complete when backward has reached that of its parameters which forward used first.
    """
    position: dict[torch.nn.Parameter, int] = {}
    for param in _in_order_of_forward(ddp.ddp.module):
        position.setdefault(param, len(position))
    return sorted(ddp.groups, key=lambda group: -min(position[param] for param in group.params))


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
