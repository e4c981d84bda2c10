"""The end of a link that sends activations and receives their gradients."""

import weakref
from collections import deque
from collections.abc import Sequence
from zlib import crc32

import torch
from attrs import Factory, define, field, frozen

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import Header, HostMessages
from megatron_mimo_coord.bridges.links import Link, Ops, Receipt
from megatron_mimo_coord.bridges.parts import Part, Whole
from megatron_mimo_coord.bridges.routes import (
    Delivery,
    assigned,
    giver,
    in_turn,
    place,
    takers,
)
from megatron_mimo_coord.bridges.sample_check import refuse_other_samples
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.mimo_model import SPLIT_SIZES


@frozen
class _Sent:
    """An output that was sent, until its gradient is here."""

    output: "weakref.ref[torch.Tensor]"
    whole: Whole
    wants_gradient: bool


@define(eq=False, kw_only=True)
class Outgoing(Link):
    """Sends a module's output to the language model, and receives its gradient.

    Args:
        assignments: where the module's assignments wait, if its images can be assigned.
        peers: the way between hosts of data-parallel ranks; that of headers if left out.
    """

    assignments: PendingAssignments | None = None
    peers: HostMessages = field(default=Factory(lambda self: self.hosts, takes_self=True))
    _dp: int = field(init=False)
    _lane: int = field(init=False)
    _turn: range = field(init=False)
    _pass: int = field(init=False, default=0)
    _microbatch: int = field(init=False, default=0)
    # Outputs whose gradients are to come. The schedule keeps an output until its backward; one
    # that is gone was sent in a forward_only pass, and nothing will come for it.
    _sent: deque[_Sent] = field(init=False, factory=deque)

    def __attrs_post_init__(self) -> None:
        self._dp, self._lane = place(self.rank, self.ends.sources)
        self._turn = self.ends.targets_in_turn(self._dp)

    def send_forward(self, output: torch.Tensor) -> None:
        """Send an output. The peer may be busy: the next message waits for it, and not this one."""
        self.finish()
        self.launch(self._forward(output, self._next_assignment()))

    def recv_backward(self) -> torch.Tensor | None:
        """The gradient of the earliest output that has none yet; None if it needs none."""
        self.finish()
        gradient = self._backward()
        self.run(gradient.ops)
        return gradient.tensor()

    def send_forward_recv_backward(self, output: torch.Tensor) -> torch.Tensor | None:
        """Both, in one batch."""
        self.finish()
        sends = self._forward(output, self._next_assignment())
        gradient = self._backward()
        self.run(sends + gradient.ops)
        return gradient.tensor()

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self, output: torch.Tensor, assignment: ImageAssignment | None) -> Ops:
        tensor = output.detach().to(self.dtype)  # its own storage, should output be freed
        ops: Ops = []
        parts = []
        for delivery in self._deliveries(output, assignment):
            part = Part(delivery.target, ((delivery.start, delivery.rows),))
            header = self._header(output, delivery, assignment)
            message = part.cut(tensor, self.dim) if 0 not in header.shape else None
            numbers = header.pack()
            lanes, targets = self.ends.sources[self._dp], self.ends.targets[delivery.target]
            for target in takers(self.rank, lanes, targets):
                self.hosts.send(target, numbers)
                if message is not None:
                    ops.append(self.send(message, target))
            if message is not None:
                parts.append(part)
        if assignment is not None:
            self._agree(assignment)
        self._microbatch += 1
        self._remember(output, Whole(tuple(tensor.shape), self.dim, self.dtype, tuple(parts)))
        return ops

    def _next_assignment(self) -> ImageAssignment | None:
        if self.assignments is None:
            return None
        if self._pass != self.assignments.passes:
            self._pass, self._microbatch = self.assignments.passes, 0
        return self.assignments.take(self.name)

    def _deliveries(
        self, output: torch.Tensor, assignment: ImageAssignment | None
    ) -> Sequence[Delivery]:
        if assignment is not None:
            return self._assigned(output.shape[self.dim], assignment)
        return in_turn(self._turn, self._sizes(output))

    def _sizes(self, output: torch.Tensor) -> Sequence[int]:
        """Rows of an output for each of the targets that it goes to in turn."""
        rows, number = output.shape[self.dim], len(self._turn)
        sizes = getattr(output, SPLIT_SIZES, None)  # tokens of each sample, or of each target
        if sizes is not None:
            share = len(sizes) // number
            return [sum(sizes[index * share : (index + 1) * share]) for index in range(number)]
        if rows % number:
            raise RuntimeError(
                f"rank {self.rank} has {rows} samples of {self.name} for {number} ranks of the "
                f"language model: give the encoder as many for each of them"
            )
        return [rows // number] * number

    def _assigned(self, rows: int, assignment: ImageAssignment) -> Sequence[Delivery]:
        deliveries = assigned(assignment, self._dp, len(self.ends.targets))
        expected = sum(delivery.rows for delivery in deliveries)
        if rows != expected:
            raise RuntimeError(
                f"the encoder {self.name} returned {rows} tokens on rank {self.rank}, but the "
                f"images that assign_images gave it have {expected}: feed it the images of "
                f"assignment.local in their order, and say how many tokens it makes of each"
                f"{self._remark()}"
            )
        return [each for each in deliveries if each.rows or each.target in self._turn]

    def _remark(self) -> str:
        return "" if self.assignments is None else self.assignments.remark(self.name)

    def _header(
        self, output: torch.Tensor, delivery: Delivery, assignment: ImageAssignment | None
    ) -> Header:
        shape = list(output.shape)
        shape[self.dim] = delivery.rows
        return Header(
            microbatch=self._microbatch,
            dtype=self.dtype,
            shape=tuple(shape),
            wants_gradient=output.requires_grad,
            digests=() if assignment is None else assignment.sample_digests,
            routed=delivery.routed,
            runs=delivery.runs,
            total_rows=delivery.total_rows,
            senders=delivery.senders,
        )

    def _agree(self, assignment: ImageAssignment) -> None:
        """Compare with the other data-parallel ranks: each one with the one before it.

        If they were given different numbers, a language model rank would wait for what nobody means
        to send. One that was left out of a call says nothing here: the others wait for it, until
        its next call tells them that it is at a later microbatch than they are.
        """
        number = len(self.ends.sources)
        if number == 1:
            return
        digests = assignment.sample_digests
        owners = crc32(repr(assignment.owners).encode())
        before = self.ends.sources[(self._dp - 1) % number][self._lane]
        behind = self.ends.sources[(self._dp + 1) % number][self._lane]
        self.peers.send(behind, [self._microbatch, owners, *digests])
        their_microbatch, their_owners, *theirs = self.peers.receive(before)
        if their_microbatch != self._microbatch:
            (at, waits), (_, left_out) = sorted(
                [(their_microbatch, before), (self._microbatch, self.rank)]
            )
            refuse_other_samples(self.name, at, (waits, digests), (left_out, ()))
        refuse_other_samples(self.name, self._microbatch, (before, theirs), (self.rank, digests))
        if their_owners != owners:
            raise RuntimeError(
                f"microbatch {self._microbatch}: ranks {before} and {self.rank} deal out images of "
                f"{self.name} differently: call assign_images with the same costs on both"
            )

    # -- backward ----------------------------------------------------------------------------------

    def _remember(self, output: torch.Tensor, whole: Whole) -> None:
        self._drop_dead_references()
        if torch.is_grad_enabled():
            self._sent.append(_Sent(weakref.ref(output), whole, output.requires_grad))

    def _drop_dead_references(self) -> None:
        while self._sent and self._sent[0].output() is None:
            self._sent.popleft()

    def _backward(self) -> Receipt[torch.Tensor | None]:
        self._drop_dead_references()
        if not self._sent:
            raise RuntimeError(
                f"rank {self.rank} is to receive a gradient of {self.name}, but none of the "
                f"outputs that it sent is left: keep them until their backward, as Megatron's "
                f"schedules do"
            )
        sent = self._sent.popleft()
        if not sent.wants_gradient:
            return Receipt([], lambda: None)
        buffers, whole = sent.whole.buffers()
        lanes = [self.ends.targets[part.peer] for part in sent.whole.parts]
        return Receipt(
            [
                self.receive(buffer, giver(self.rank, self._lane, each))
                for buffer, each in zip(buffers, lanes, strict=True)
            ],
            whole,
        )


class StageOutgoing(Outgoing):
    """Sends the whole output of one stage to the next."""

    def _deliveries(
        self, output: torch.Tensor, assignment: ImageAssignment | None
    ) -> Sequence[Delivery]:
        return in_turn([0], [output.shape[0]])
