"""The end of a bridge that sends activations and receives their gradients."""

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from attrs import define, field

from megatron_mimo_coord.bridges.agreement import Agreement
from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.bridges.links import Link, Ops, Part, Whole
from megatron_mimo_coord.bridges.routes import Delivery, assigned, in_turn
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.mimo_model import split_sizes


@define(eq=False, kw_only=True)
class SourceEnd(Link):
    """Tells hosts what comes of an output, sends it, and receives its gradient."""

    def assigned(self, assignment: ImageAssignment) -> list[Delivery]:
        """What this rank has for each target; one that expects something hears of nothing."""
        everyone = assigned(assignment, self.dp, len(self.there))
        return [each for each in everyone if each.rows or each.target in self.turn]

    def announce(
        self,
        output: torch.Tensor,
        deliveries: Sequence[Delivery],
        microbatch: int,
        assignment: ImageAssignment | None,
    ) -> Whole:
        """Tell each target's host what comes of an output, and which parts of it travel.

        Args:
            output: the tensor.
            deliveries: what is for whom.
            microbatch: its number in the pass.
            assignment: of its images, if there is one.
        """
        parts = []
        for delivery in deliveries:
            shape = list(output.shape)
            shape[self.dim] = delivery.rows
            header = Header(
                microbatch=microbatch,
                dtype=self.dtype,
                shape=tuple(shape),
                wants_gradient=output.requires_grad,
                digests=() if assignment is None else assignment.sample_digests,
                runs=delivery.runs,
                total_rows=delivery.total_rows,
                senders=delivery.senders,
            )
            numbers = header.pack()
            for target in self.takers(delivery.target):
                self.hosts.send(target, numbers)
            if 0 not in shape:
                parts.append(Part(delivery.target, ((delivery.start, delivery.rows),)))
        return Whole(tuple(output.shape), tuple(parts))

    def sends(self, tensor: torch.Tensor, whole: Whole) -> Ops:
        """The parts of an output that was announced, to be sent."""
        # Its own storage, should the output be freed.
        return super().sends(tensor.detach().to(self.dtype), whole)


@define(eq=False, kw_only=True)
class Outgoing(SourceEnd):
    """That of a module on ranks of its own, which the schedule calls for each microbatch.

    Args:
        assignments: where those of its images wait, if it has any.
        agreement: on them, of all ranks that send; None from a stage to the next, which gets all.
            One that was left out of a call says nothing: the others wait for it, until its next
            call tells that it is at a later microbatch.
    """

    assignments: PendingAssignments
    agreement: Agreement | None = None
    # Outputs whose gradients are to come, and what of them wants one. The schedule keeps an output
    # until its backward; one that is gone was sent in a forward_only pass, and nothing will come.
    _sent: deque[tuple["weakref.ref[torch.Tensor]", Whole | None]] = field(
        init=False, factory=deque
    )

    def send_forward(self, output: torch.Tensor) -> None:
        """Send an output. The peer may be busy: the next message waits for it, and not this one."""
        self.finish()
        self.launch(self._forward(output))

    def recv_backward(self) -> torch.Tensor | None:
        """The gradient of the earliest output that has none yet; None if it needs none."""
        self.finish()
        return self._exchange([])

    def send_forward_recv_backward(self, output: torch.Tensor) -> torch.Tensor | None:
        """Both, in one batch."""
        self.finish()
        return self._exchange(self._forward(output))

    def _forward(self, output: torch.Tensor) -> Ops:
        microbatch, assignment = self.assignments.microbatch, self.assignments.take(self.name)
        if assignment is None or self.agreement is None:
            deliveries = in_turn(self.turn, self._sizes(output))
        else:
            made = {self.name: [(assignment, output.shape[self.dim])]}
            self.agreement.send(made, microbatch)
            self.agreement.check()
            deliveries = self.assigned(assignment)
        whole = self.announce(output, deliveries, microbatch, assignment)
        self._drop_dead_references()
        if torch.is_grad_enabled():
            self._sent.append((weakref.ref(output), whole if output.requires_grad else None))
        return self.sends(output, whole)

    def _sizes(self, output: torch.Tensor) -> Sequence[int]:
        """Rows of an output for each of the targets that it goes to in turn."""
        rows, number = output.shape[self.dim], len(self.turn)
        sizes = split_sizes(output)  # tokens of each sample, or of each target
        if sizes is not None:
            share = len(sizes) // number
            return [sum(sizes[index * share : (index + 1) * share]) for index in range(number)]
        if rows % number:
            raise RuntimeError(
                f"rank {self.rank} has {rows} samples of {self.name} for {number} ranks of the "
                f"language model: give the encoder as many for each of them"
            )
        return [rows // number] * number

    def _exchange(self, sends: Ops) -> torch.Tensor | None:
        """Send, and receive the next gradient, in one batch."""
        self._drop_dead_references()
        if not self._sent:
            raise RuntimeError(
                f"rank {self.rank} is to receive a gradient of {self.name}, but none of the "
                f"outputs that it sent is left: keep them until their backward, as Megatron's "
                f"schedules do"
            )
        _, wanted = self._sent.popleft()
        receives, gradient = ([], None) if wanted is None else self.receipt(wanted)
        self.run(sends + receives)
        return None if gradient is None else gradient()

    def _drop_dead_references(self) -> None:
        while self._sent and self._sent[0][0]() is None:
            self._sent.popleft()
