"""The end of a link that receives activations and sends their gradients back."""

from collections import deque
from collections.abc import Mapping
from itertools import accumulate

import torch
import torch.distributed as dist
from attrs import define, evolve, field

from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.bridges.links import Link, Ops, Receipt
from megatron_mimo_coord.bridges.parts import Part, Whole
from megatron_mimo_coord.bridges.routes import giver, place, takers
from megatron_mimo_coord.bridges.sample_check import SampleCheck, refuse_other_samples


@define(eq=False, kw_only=True)
class Incoming(Link):
    """Receives a module's output, and sends its gradient back.

    Args:
        check: compares the samples with those that this rank was given.
        sequence_peers: ranks that were sent the same and use other positions of it, as with
            context parallelism: the gradient is the sum of theirs.
    """

    check: SampleCheck | None = None
    sequence_peers: dist.ProcessGroup | None = None
    _dp: int = field(init=False)
    _lane: int = field(init=False)
    _turn: range = field(init=False)
    # Of the microbatches whose backward has run and whose gradient is to be sent. Put there by
    # backward itself: a forward_only pass leaves nothing behind.
    _to_return: deque[Whole] = field(init=False, factory=deque)

    def __attrs_post_init__(self) -> None:
        self._dp, self._lane = place(self.rank, self.ends.targets)
        self._turn = self.ends.sources_in_turn(self._dp)

    def recv_forward(self) -> torch.Tensor:
        """What the other side sends next."""
        self.finish()
        activation = self._forward()
        self.run(activation.ops)
        return activation.tensor()

    def send_backward(self, gradient: torch.Tensor | None) -> None:
        """Send the gradient of the earliest tensor whose backward has run."""
        self.finish()
        self.run(self._backward(gradient))

    def send_backward_recv_forward(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Both, in one batch."""
        self.finish()
        sends = self._backward(gradient)
        activation = self._forward()
        self.run(sends + activation.ops)
        return activation.tensor()

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self) -> Receipt[torch.Tensor]:
        headers = {peer: self._header(peer) for peer in self._turn}
        for peer in headers[self._turn[0]].senders:
            if peer not in headers:
                headers[peer] = self._header(peer)
        if self.check is not None:
            self._compare(self.check, headers)
        whole = self._whole(headers)
        buffers, join = whole.buffers()
        wanted = tuple(part for part in whole.parts if headers[part.peer].wants_gradient)
        to_return = evolve(whole, parts=wanted)

        def activation() -> torch.Tensor:
            tensor = join().requires_grad_()
            if torch.is_grad_enabled():
                tensor.register_hook(lambda _: self._to_return.append(to_return))
            return tensor

        return Receipt(
            [
                self.receive(buffer, self._source(part.peer))
                for part, buffer in zip(whole.parts, buffers, strict=True)
            ],
            activation,
        )

    def _header(self, peer: int) -> Header:
        source = self._source(peer)
        header = Header.unpack(self.hosts.receive(source))
        if header.dtype != self.dtype:
            raise RuntimeError(
                f"rank {source} sends {self.name} in {header.dtype}, but rank {self.rank} expects "
                f"{self.dtype}: give both the same pipeline_dtype"
            )
        return header

    def _source(self, peer: int) -> int:
        """The global rank that this one receives from, of a data-parallel rank's lanes."""
        return giver(self.rank, self._lane, self.ends.sources[peer])

    def _compare(self, check: SampleCheck, headers: Mapping[int, Header]) -> None:
        """The senders with each other, and with what this rank was given."""
        (peer, first), *others = headers.items()
        said = self._source(peer), first.digests
        for other, header in others:
            theirs = self._source(other), header.digests
            refuse_other_samples(self.name, first.microbatch, said, theirs)
        check.arrived(self.rank, self._source(peer), first)

    def _whole(self, headers: Mapping[int, Header]) -> Whole:
        """The tensor that messages with these headers make up."""
        first = headers[self._turn[0]]
        shape = list(first.shape)
        rows = [header.shape[self.dim] for header in headers.values()]
        if first.routed:
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
        return Whole(tuple(shape), self.dim, self.dtype, parts)

    # -- backward ----------------------------------------------------------------------------------

    def _backward(self, gradient: torch.Tensor | None) -> Ops:
        if gradient is None:
            raise RuntimeError(
                f"backward has run on rank {self.rank}, but brought no gradient of {self.name}: "
                f"the loss does not depend on what was received"
            )
        whole = self._to_return.popleft()
        tensor = gradient.to(self.dtype)
        if self.sequence_peers is not None and whole.parts:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.sequence_peers)
        ops: Ops = []
        for part in whole.parts:
            message = part.cut(tensor, self.dim)
            lanes, sources = self.ends.targets[self._dp], self.ends.sources[part.peer]
            ops += [self.send(message, source) for source in takers(self.rank, lanes, sources)]
        return ops
