"""One rank's end of a bridge, or of the way from one stage of a module to the next.

Hosts exchange headers, devices exchange tensors, and neither kind of message waits for the other:
a host waits for its peer's host alone. NCCL reads a tensor that is sent and writes one that is
received in the order of the current stream, so nothing here waits for the device either.

What is sent and received at once goes into one batch, in which NCCL lets each part proceed by
itself. The schedule calls both ends of a link in step, so batches match one to one.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from zlib import crc32

import torch
import torch.distributed as dist
from attrs import field, frozen

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import Header, HostMessages
from megatron_mimo_coord.bridges.routes import Delivery, Ends, Run, assigned, in_turn, pairs
from megatron_mimo_coord.bridges.sample_check import SampleCheck, refuse_other_samples
from megatron_mimo_coord.layout.image_assignment import ImageAssignment


@frozen
class Groups:
    """The two process groups of a link: ``devices`` is connected, ``hosts`` is gloo."""

    devices: dist.ProcessGroup
    hosts: HostMessages


@frozen
class Part:
    """Rows of a tensor that one data-parallel rank on the other side sends or receives."""

    peer: int
    runs: tuple[Run, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(count for _, count in self.runs)

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """These rows of the whole tensor, contiguous; a view if they are already."""
        pieces = [tensor.narrow(dim, start, count) for start, count in self.runs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)).contiguous()


@frozen
class Whole:
    """A tensor that is sent or received in parts.

    Args:
        shape: of the whole.
        dim: along which it is cut.
        parts: which cover it, in any order; those without elements do not travel.
    """

    shape: tuple[int, ...]
    dim: int
    parts: tuple[Part, ...]
    dtype: torch.dtype = field(kw_only=True)

    def buffers(self) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
        """Where to receive each part, and what makes the whole of them once they are there."""
        device = torch.cuda.current_device()
        if self.dim == 0 and all(len(part.runs) == 1 for part in self.parts):
            whole = torch.empty(self.shape, dtype=self.dtype, device=device)
            return [whole.narrow(0, *part.runs[0]) for part in self.parts], lambda: whole
        shape = list(self.shape)
        received = []
        for part in self.parts:
            shape[self.dim] = part.rows
            received.append(torch.empty(shape, dtype=self.dtype, device=device))
        return received, lambda: self._join(received)

    def _join(self, received: Sequence[torch.Tensor]) -> torch.Tensor:
        pieces: list[tuple[int, torch.Tensor]] = []
        for part, message in zip(self.parts, received, strict=True):
            counts = [count for _, count in part.runs]
            starts = [start for start, _ in part.runs]
            pieces += zip(starts, message.split(counts, self.dim), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], self.dim)


@frozen
class _Sent:
    """An output that was sent, until its gradient is here."""

    output: "weakref.ref[torch.Tensor]"
    whole: Whole
    wants_gradient: bool


Ops = list[dist.P2POp]
Exchange = tuple[Ops, Callable[[], torch.Tensor | None]]


class _End:
    """What both ends of a link have in common."""

    def __init__(
        self, name: str, ends: Ends, rank: int, groups: Groups, dtype: torch.dtype, dim: int
    ) -> None:
        self.name = name
        self._ends = ends
        self._groups = groups
        self._dtype = dtype
        self._dim = dim
        self._rank = rank
        self._under_way: tuple[list[dist.Work], Ops] = ([], [])

    def _send(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, tensor, rank, self._groups.devices)

    def _receive(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, tensor, rank, self._groups.devices)

    def finish(self) -> None:
        """Wait until what was sent last has been taken."""
        works, _ = self._under_way
        for work in works:
            work.wait()
        self._under_way = ([], [])
        self._groups.hosts.finish()

    def _run(self, ops: Ops, wait: bool = True) -> None:
        """One batch. With NCCL, waiting makes the current stream wait, and not the host.

        A send that is not waited for is until the next batch: its peer may still be computing, and
        this rank has something better to do. What it sends is kept alive meanwhile.
        """
        self._under_way = (dist.batch_isend_irecv(ops) if ops else [], ops)
        if wait:
            works, _ = self._under_way
            for work in works:
                work.wait()
            self._under_way = ([], [])


def place(rank: int, side: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(data-parallel rank, lane) of a global rank on one side of a link."""
    for dp, lanes in enumerate(side):
        if rank in lanes:
            return dp, lanes.index(rank)
    raise ValueError(f"rank {rank} is not one of {side}")


class Outgoing(_End):
    """Sends a module's output forward, and receives its gradient.

    Args:
        name: of the module.
        ends: the ranks on both sides.
        rank: this one.
        groups: device and host group of the link.
        dtype: in which tensors travel.
        dim: along which the output is cut if it goes to several.
        assignments: where the module's assignments wait, if its images can be assigned.
        check: of what this rank receives of the module, if it does.
    """

    def __init__(
        self,
        name: str,
        ends: Ends,
        rank: int,
        groups: Groups,
        dtype: torch.dtype,
        dim: int = 0,
        assignments: PendingAssignments | None = None,
        check: SampleCheck | None = None,
    ) -> None:
        super().__init__(name, ends, rank, groups, dtype, dim)
        self._dp, self._lane = place(rank, ends.sources)
        self._turn = ends.targets_in_turn(self._dp)
        self._assignments = assignments
        self._check = check
        self._pass = self._microbatch = 0
        # Outputs whose gradients are to come. The schedule keeps an output until its backward; one
        # that is gone was sent in a forward_only pass, and nothing will come for it.
        self._sent: deque[_Sent] = deque()

    def send_forward(self, output: torch.Tensor) -> None:
        """Send an output; does not wait until it is taken."""
        self._run(self._forward(output), wait=False)

    def recv_backward(self) -> torch.Tensor | None:
        """The gradient of the earliest output whose gradient is not here yet."""
        self.finish()
        ops, gradient = self._backward()
        self._run(ops)
        return gradient()

    def send_forward_recv_backward(self, output: torch.Tensor) -> torch.Tensor | None:
        """Both, in one batch."""
        sends = self._forward(output)
        receives, gradient = self._backward()
        self._run(sends + receives)
        return gradient()

    def _forward(self, output: torch.Tensor) -> Ops:
        self.finish()
        assignment = self._next_assignment()
        deliveries = self._deliveries(output, assignment)
        tensor = output.detach().to(self._dtype)  # its own storage, should output be freed
        ops: Ops = []
        parts = []
        for delivery in deliveries:
            part = Part(delivery.target, ((delivery.start, delivery.rows),))
            shape = list(tensor.shape)
            shape[self._dim] = delivery.rows
            header = Header(
                microbatch=self._microbatch,
                dtype=self._dtype,
                shape=tuple(shape),
                wants_gradient=output.requires_grad,
                digests=() if assignment is None else assignment.sample_digests,
                routed=delivery.routed,
                runs=delivery.runs,
                total_rows=delivery.total_rows,
                senders=delivery.senders,
            ).pack()
            travels = delivery.rows > 0 and tensor.numel() > 0
            message = part.cut(tensor, self._dim) if travels else None
            lanes = self._ends.targets[delivery.target]
            for lane in pairs(self._lane, len(self._ends.sources[self._dp]), len(lanes)):
                self._groups.hosts.send(lanes[lane], header)
                if message is not None:
                    ops.append(self._send(message, lanes[lane]))
            if travels:
                parts.append(part)
        if assignment is not None:
            self._agree(assignment)
        self._microbatch += 1
        self._remember(
            output, Whole(tuple(tensor.shape), self._dim, tuple(parts), dtype=self._dtype)
        )
        return ops

    def _next_assignment(self) -> ImageAssignment | None:
        if self._assignments is None:
            return None
        if self._pass != self._assignments.passes:
            self._pass, self._microbatch = self._assignments.passes, 0
        assignment = self._assignments.take(self.name)
        if assignment is None and self._check is not None:
            self._check.given_none()
        return assignment

    def _agree(self, assignment: ImageAssignment) -> None:
        """Compare with the data-parallel ranks on both sides: each one checks the one before.

        If ranks were given different numbers, one of them would wait for what the other does not
        mean to send.
        """
        number = len(self._ends.sources)
        if number == 1:
            return
        digests = assignment.sample_digests
        owners = crc32(repr(assignment.owners).encode())
        before = self._ends.sources[(self._dp - 1) % number][self._lane]
        behind = self._ends.sources[(self._dp + 1) % number][self._lane]
        self._groups.hosts.send(behind, [owners, *digests])
        their_owners, *theirs = self._groups.hosts.receive(before)
        refuse_other_samples(self.name, self._microbatch, (before, theirs), (self._rank, digests))
        if their_owners != owners:
            raise RuntimeError(
                f"microbatch {self._microbatch}: ranks {before} and {self._rank} deal out images "
                f"of {self.name} differently: call assign_images with the same costs on both"
            )

    def _deliveries(
        self, output: torch.Tensor, assignment: ImageAssignment | None
    ) -> Sequence[Delivery]:
        rows = output.shape[self._dim]
        if assignment is not None:
            return self._assigned(rows, output.ndim, assignment)
        number = len(self._turn)
        sizes = getattr(output, "_mimo_bridge_split_sizes", None)  # tokens of each sample
        if sizes is None or number == 1:
            if rows % number:
                raise RuntimeError(
                    f"rank {self._rank} has {rows} tokens of {self.name} for {number} ranks of the "
                    f"language model, but does not know how many belong to which sample: pass "
                    f"input_ids of the encoder's samples to the model's forward"
                )
            return in_turn(self._turn, [rows // number] * number)
        share = len(sizes) // number
        sums = [sum(sizes[index * share : (index + 1) * share]) for index in range(number)]
        return in_turn(self._turn, sums)

    def _assigned(self, rows: int, ndim: int, assignment: ImageAssignment) -> Sequence[Delivery]:
        deliveries = assigned(assignment, self._dp, len(self._ends.targets))
        expected = sum(delivery.rows for delivery in deliveries)
        if rows != expected or ndim != 2:
            raise RuntimeError(
                f"the encoder {self.name} returned {rows} tokens on rank {self._rank}, but the "
                f"images that assign_images gave it have {expected}: feed it the images of "
                f"assignment.local in their order, and say how many tokens it makes of each"
            )
        return [each for each in deliveries if each.rows or each.target in self._turn]

    def _remember(self, output: torch.Tensor, whole: Whole) -> None:
        while self._sent and self._sent[0].output() is None:
            self._sent.popleft()
        if torch.is_grad_enabled():
            self._sent.append(_Sent(weakref.ref(output), whole, output.requires_grad))

    def _backward(self) -> Exchange:
        while self._sent and self._sent[0].output() is None:
            self._sent.popleft()
        if not self._sent:
            raise RuntimeError(
                f"rank {self._rank} is to receive a gradient of {self.name}, but has sent nothing "
                f"that one is due for: every pass must keep its outputs until their backward"
            )
        sent = self._sent.popleft()
        if not sent.wants_gradient:
            return [], lambda: None
        buffers, whole = sent.whole.buffers()
        ops = []
        for part, buffer in zip(sent.whole.parts, buffers, strict=True):
            lanes = self._ends.targets[part.peer]
            ops.append(self._receive(buffer, lanes[self._lane % len(lanes)]))
        return ops, whole


class StageOutgoing(Outgoing):
    """Sends the whole output of one stage to the next."""

    def _deliveries(
        self, output: torch.Tensor, assignment: ImageAssignment | None
    ) -> Sequence[Delivery]:
        return [Delivery(0, 0, output.shape[self._dim])]


class Incoming(_End):
    """Receives a module's output, and sends its gradient back.

    Args:
        name: of the module.
        ends: the ranks on both sides.
        rank: this one.
        groups: device and host group of the link.
        dtype: in which tensors travel.
        dim: along which the output is cut if it comes from several.
        check: compares the samples with those that this rank was given.
    """

    def __init__(
        self,
        name: str,
        ends: Ends,
        rank: int,
        groups: Groups,
        dtype: torch.dtype,
        dim: int = 0,
        check: SampleCheck | None = None,
    ) -> None:
        super().__init__(name, ends, rank, groups, dtype, dim)
        self._dp, self._lane = place(rank, ends.targets)
        self._turn = ends.sources_in_turn(self._dp)
        self._check = check
        # Of the microbatches whose backward has run and whose gradient is to be sent. Put there by
        # backward itself: a forward_only pass leaves nothing behind.
        self._to_return: deque[Whole] = deque()

    def recv_forward(self) -> torch.Tensor:
        """What the other side sends next."""
        self.finish()
        ops, activation = self._forward()
        self._run(ops)
        return self._watched(activation)

    def send_backward(self, gradient: torch.Tensor | None) -> None:
        """Send the gradient of the earliest tensor whose backward has run."""
        self.finish()
        self._run(self._backward(gradient))

    def send_backward_recv_forward(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Both, in one batch."""
        self.finish()
        sends = self._backward(gradient)
        receives, activation = self._forward()
        self._run(sends + receives)
        return self._watched(activation)

    def _forward(self) -> tuple[Ops, tuple[Whole, Whole, Callable[[], torch.Tensor]]]:
        headers = {peer: self._header(peer) for peer in self._turn}
        first = headers[self._turn[0]]
        for peer in first.senders:
            if peer not in headers:
                headers[peer] = self._header(peer)
        if self._check is not None:
            self._compare(headers)
        whole = self._whole(headers)
        buffers, join = whole.buffers()
        ops = [
            self._receive(buffer, self._source(part.peer))
            for part, buffer in zip(whole.parts, buffers, strict=True)
        ]
        wanted = tuple(part for part in whole.parts if headers[part.peer].wants_gradient)
        return ops, (whole, Whole(whole.shape, whole.dim, wanted, dtype=whole.dtype), join)

    def _header(self, peer: int) -> Header:
        source = self._source(peer)
        header = Header.unpack(self._groups.hosts.receive(source))
        if header.dtype != self._dtype:
            raise RuntimeError(
                f"rank {source} sends {self.name} in {header.dtype}, but rank {self._rank} expects "
                f"{self._dtype}: give both the same pipeline_dtype"
            )
        return header

    def _compare(self, headers: dict[int, Header]) -> None:
        """The senders with each other, and with what this rank was given."""
        assert self._check is not None
        (peer, first), *others = headers.items()
        for other, header in others:
            refuse_other_samples(
                self.name,
                first.microbatch,
                (self._source(peer), first.digests),
                (self._source(other), header.digests),
            )
        self._check.arrived(self._source(peer), first)

    def _source(self, peer: int) -> int:
        lanes = self._ends.sources[peer]
        return lanes[self._lane % len(lanes)]

    def _whole(self, headers: dict[int, Header]) -> Whole:
        """The tensor that messages with these headers make up."""
        peers = list(headers)
        first = headers[peers[0]]
        shape = list(first.shape)
        rows = [headers[peer].shape[self._dim] for peer in peers]
        if first.routed:
            shape[self._dim] = first.total_rows
            runs = [headers[peer].runs for peer in peers]
        else:
            shape[self._dim] = sum(rows)
            starts = accumulate(rows, initial=0)
            runs = [((start, count),) for start, count in zip(starts, rows, strict=False)]
        travels = [0 not in headers[peer].shape for peer in peers]
        parts = [Part(*each) for each in zip(peers, runs, strict=True)]
        return Whole(
            tuple(shape),
            self._dim,
            tuple(part for part, has_rows in zip(parts, travels, strict=True) if has_rows),
            dtype=self._dtype,
        )

    def _watched(self, received: tuple[Whole, Whole, Callable[[], torch.Tensor]]) -> torch.Tensor:
        _, to_return, join = received
        activation = join().requires_grad_()

        def backward_has_run(_: torch.Tensor) -> None:
            self._to_return.append(to_return)

        activation.register_hook(backward_has_run)
        return activation

    def _backward(self, gradient: torch.Tensor | None) -> Ops:
        if gradient is None:
            raise RuntimeError(
                f"backward has run on rank {self._rank}, but brought no gradient of {self.name}: "
                f"the loss does not depend on what was received"
            )
        whole = self._to_return.popleft()
        tensor = gradient.to(self._dtype)
        ops = []
        for part in whole.parts:
            message = part.cut(tensor, whole.dim)
            lanes = self._ends.sources[part.peer]
            here = len(self._ends.targets[self._dp])
            for lane in pairs(self._lane, here, len(lanes)):
                ops.append(self._send(message, lanes[lane]))
        return ops
