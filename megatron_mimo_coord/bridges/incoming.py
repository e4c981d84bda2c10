"""The end of a bridge that receives activations and sends their gradients back."""

from collections import deque
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
import torch.distributed as dist
from attrs import define, evolve, field
from megatron.core.hyper_comm_grid import HyperCommGrid

from megatron_mimo_coord.bridges.agreement import refuse_other_samples
from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.bridges.links import Link, Ops, Part, Whole
from megatron_mimo_coord.bridges.routes import takers
from megatron_mimo_coord.layout import ModuleGrid

Arrival = tuple[Ops, Callable[[], torch.Tensor], Whole]
"""A receipt of an output, and the parts of it whose gradient somebody wants."""


def sequence_peers(grid: HyperCommGrid) -> dist.ProcessGroup | None:
    """Ranks that read other positions of the same samples as this one, if there are any."""
    return grid.get_pg("cp") if ModuleGrid.of("", grid).dim("cp") > 1 else None


@define(eq=False, kw_only=True)
class TargetEnd(Link):
    """Hears what comes, receives it, and sends its gradient back.

    Args:
        sequence_peers: ranks that were sent the same and use other positions of it, as with
            context parallelism: the gradient is the sum of theirs.
    """

    sequence_peers: dist.ProcessGroup | None = None

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.sequence_peers is not None:
            peers, lanes = dist.get_process_group_ranks(self.sequence_peers), self.here[self.dp]
            if not any(takers(peer, lanes, there) for peer in peers for there in self.there):
                self.sequence_peers = None  # other tensor-parallel ranks return what is theirs

    def hear(self) -> dict[int, Header]:
        """The headers of what comes next, by data-parallel rank; they must mean the same samples.

        Raises:
            RuntimeError: they do not, or travel in another dtype than this rank expects.
        """
        peer = self.turn[0]
        headers = {peer: self._header(peer)}
        first = headers[peer]
        for other in (*self.turn[1:], *first.senders):
            if other not in headers:
                headers[other] = self._header(other)
                said = (self.giver(peer), first.digests)
                theirs = (self.giver(other), headers[other].digests)
                refuse_other_samples(self.name, first.microbatch, said, theirs)
        return headers

    def arrival(self, headers: Mapping[int, Header]) -> Arrival:
        """What comes with these headers, to be received."""
        whole = self._whole(headers)
        wanted = tuple(part for part in whole.parts if headers[part.peer].wants_gradient)
        return *self.receipt(whole), evolve(whole, parts=wanted)

    def checked(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """A gradient that there must be."""
        if gradient is None:
            raise RuntimeError(
                f"backward has run on rank {self.rank}, but brought no gradient of {self.name}: "
                f"the loss does not depend on what was received"
            )
        return gradient

    def returns(self, gradient: torch.Tensor, whole: Whole) -> Ops:
        """The gradient of what came so, to be sent."""
        tensor = gradient.to(self.dtype)
        if self.sequence_peers is not None and whole.parts:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # autograd may use it on
            dist.all_reduce(tensor, group=self.sequence_peers)
        return self.sends(tensor, whole)

    def _header(self, peer: int) -> Header:
        source = self.giver(peer)
        header = Header.unpack(self.hosts.receive(source))
        if header.dtype != self.dtype:
            raise RuntimeError(
                f"rank {source} sends {self.name} in {header.dtype}, but rank {self.rank} expects "
                f"{self.dtype}: give both the same pipeline_dtype"
            )
        return header

    def _whole(self, headers: Mapping[int, Header]) -> Whole:
        """The tensor that messages with these headers make up."""
        first = headers[self.turn[0]]
        shape = list(first.shape)
        rows = [header.shape[self.dim] for header in headers.values()]
        if first.total_rows:
            shape[self.dim] = first.total_rows
            runs = [header.runs for header in headers.values()]
        else:
            shape[self.dim] = sum(rows)
            starts = accumulate(rows, initial=0)
            runs = [((start, count),) for start, count in zip(starts, rows, strict=False)]
        parts = tuple(
            Part(peer, each)
            for (peer, header), each in zip(headers.items(), runs, strict=True)
            if 0 not in header.shape
        )
        return Whole(tuple(shape), parts)


@define(eq=False, kw_only=True)
class Incoming(TargetEnd):
    """That on ranks which the schedule has receive each microbatch by itself.

    Args:
        assignments: what the samples are compared with, if the module has images.
    """

    assignments: PendingAssignments
    # Of the microbatches whose backward has run and whose gradient is to be sent. Put there by
    # backward itself: a forward_only pass leaves nothing behind.
    _to_return: deque[Whole] = field(init=False, factory=deque)

    def recv_forward(self) -> torch.Tensor:
        """What the other side sends next."""
        self.finish()
        return self._exchange([])

    def send_backward(self, gradient: torch.Tensor | None) -> None:
        """Send the gradient of the earliest tensor whose backward has run."""
        self.finish()
        self.run(self._backward(gradient))

    def send_backward_recv_forward(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Both, in one batch."""
        self.finish()
        return self._exchange(self._backward(gradient))

    def _exchange(self, sends: Ops) -> torch.Tensor:
        """Send, and receive the next activation, in one batch."""
        headers = self.hear()
        peer, first = next(iter(headers.items()))
        self.assignments.arrived(self.name, self.rank, self.giver(peer), first)
        receives, activation, to_return = self.arrival(headers)
        self.run(sends + receives)
        tensor = activation().requires_grad_()
        if torch.is_grad_enabled():
            tensor.register_hook(lambda _: self._to_return.append(to_return))
        return tensor

    def _backward(self, gradient: torch.Tensor | None) -> Ops:
        return self.returns(self.checked(gradient), self._to_return.popleft())
