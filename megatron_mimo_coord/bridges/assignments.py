"""Assignments of images that were made and whose microbatch has not run yet, in order."""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_mimo_coord.bridges.sample_check import SampleCheck, without
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.changes import Changes

# More microbatches than a step has: a trainer may deal out all of a step's at its beginning.
MAX_PENDING = 4096


class PendingAssignments:
    """For each encoder whose messages leave this rank or arrive here, a queue of assignments.

    A trainer puts them in, the bridge takes one out a microbatch. An encoder that no bridge on this
    rank asks for has no queue, and what is put in for it is dropped; a rank that holds the encoder
    must not run then.

    Attributes:
        carried: what each data-parallel rank of an encoder was given since the last step, at cost.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[ImageAssignment]] = {}
        self._checks: dict[str, SampleCheck] = {}
        self._not_taken: ImageAssignment | None = None
        self._set_aside: dict[str, int] = {}
        self._counts: dict[Hashable, int] = {}
        self.carried: dict[str, list[float]] = {}

    def watch(self, model: torch.nn.Module, changes: Changes) -> None:
        """Look at each microbatch that a model runs."""
        changes.on_close(model.register_forward_pre_hook(lambda *_: self.begin_forward()).remove)

    def open(self, encoders: Iterable[str]) -> None:
        """From now on a bridge takes these encoders' assignments out."""
        for name in encoders:
            self._queues.setdefault(name, deque())

    def check(self, encoder: str) -> SampleCheck:
        """Compares an encoder's samples that arrive on this rank with those that are put in."""
        return self._checks.setdefault(encoder, SampleCheck(encoder))

    def begin_pass(self) -> None:
        """The schedule begins: microbatches are counted from 0."""
        self._counts.clear()

    def count(self, where: Hashable) -> int:
        """Number of the microbatch in the pass that has got there, of which it is told once."""
        number = self._counts.get(where, 0)
        self._counts[where] = number + 1
        return number

    def end_pass(self, gone: Sequence[ImageAssignment]) -> None:
        """What is assigned from now on is of another step.

        Args:
            gone: assignments of this one, which an exception may have cut short.
        """
        self.carried.clear()
        for check in self._checks.values():
            check.withdraw(gone)
        for name, queue in self._queues.items():
            self._queues[name] = without(queue, gone)

    def begin_forward(self) -> None:
        """The model runs the next microbatch.

        Raises:
            RuntimeError: images were assigned, and nothing brings their tokens where they belong.
        """
        if self._not_taken is not None:
            name = self._not_taken.module
            raise RuntimeError(
                f"images of {name} were assigned to its {self._not_taken.data_parallel_size} "
                f"data-parallel ranks, but nothing brings their tokens to the ranks that read "
                f"their samples: build the schedule's p2p_communicator with "
                f"coordinator.build_pipeline_communicator(config) before assign_images is called"
            )
        for check in self._checks.values():
            check.begin_forward()

    def put(self, assignment: ImageAssignment) -> None:
        """The next microbatch's.

        Raises:
            RuntimeError: none was taken out for very long.
        """
        name, loads = assignment.module, assignment.loads
        before = self.carried.get(name, [0.0] * len(loads))
        self.carried[name] = [sum(both) for both in zip(before, loads, strict=True)]
        if name in self._checks:
            self._checks[name].given(assignment)
        queue = self._queues.get(assignment.module)
        if queue is None:
            if assignment.dp_rank is not None and assignment.data_parallel_size > 1:
                self._not_taken = assignment
            return
        if len(queue) == MAX_PENDING:
            raise RuntimeError(
                f"assign_images was called for {MAX_PENDING} microbatches of {assignment.module} "
                f"that never ran: call it once a microbatch, before the model's forward"
            )
        queue.append(assignment)

    def next(self, encoder: str) -> ImageAssignment | None:
        """What will be taken next, if anything."""
        queue = self._queues.get(encoder)
        return queue[0] if queue else None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, other microbatches run than those that these assignments were made for."""
        waiting = {name: list(queue) for name, queue in self._queues.items()}
        for queue in self._queues.values():
            queue.clear()
        self._set_aside = {name: len(queue) for name, queue in waiting.items() if queue}
        before = {name: check.set_aside() for name, check in self._checks.items()}
        carried, self.carried = self.carried, {}
        try:
            yield
        finally:
            self._set_aside, self.carried = {}, carried
            for name, given in before.items():
                self._checks[name].put_back(given)
            for name, queue in self._queues.items():
                queue.clear()
                queue.extend(waiting.get(name, ()))

    def remark(self, encoder: str) -> str:
        """What may be behind a wrong number of tokens: calls that were made for another pass."""
        if encoder not in self._set_aside:
            return ""
        return (
            f"; {self._set_aside[encoder]} microbatches of {encoder} were assigned before "
            f"evaluation(), and wait for the training step behind it: call assign_images for what "
            f"an evaluation runs inside it, or make its loader there"
        )

    def take(self, encoder: str) -> ImageAssignment | None:
        """That of the microbatch which runs now; None if its images stay with their slices."""
        queue = self._queues.get(encoder)
        if queue:
            return queue.popleft()
        if encoder in self._checks:
            self._checks[encoder].given_none()
        return None
