"""Assignments of images that were made and whose microbatch has not run yet, in order.

A trainer calls ``assign_images`` when it reads a microbatch. Where a bridge takes an encoder's
outputs from this rank, it takes the assignment with them. Where a bridge brings them, the encoder's
hosts send a digest of each sample along, which is compared with what this rank was given: ranks
that read other samples would train on garbage. In 1F1B this rank reads a microbatch after it was
received; if it reads ahead, before. Whichever comes second compares. Once the forward of a
microbatch has begun, calls are for later ones. Where encoders run first, a microbatch's call comes
twice, and the second is answered with what the first made.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import define, field

from megatron_mimo_coord.bridges.agreement import refuse_other_samples
from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.layout.image_assignment import ImageAssignment

# More microbatches than a step has: a trainer may deal out all of a step's at its beginning.
MAX_PENDING = 4096


@define(eq=False)
class _Pending:
    """Of one encoder.

    Attributes:
        to_take: assignments that a bridge on this rank will take.
        to_compare: those whose samples are to arrive on this rank.
        made: in a pass that comes once more.
        arrived: (this rank, the sender, its header) of samples that are to be compared.
        may_be_given: whether what ``assign_images`` makes next is of these samples.
        carried: what each data-parallel rank was given since the last step, at cost.
    """

    to_take: deque[ImageAssignment] = field(init=False, factory=deque)
    to_compare: deque[ImageAssignment] = field(init=False, factory=deque)
    made: deque[ImageAssignment] = field(init=False, factory=deque)
    arrived: tuple[int, int, Header] | None = field(init=False, default=None)
    may_be_given: bool = field(init=False, default=False)
    carried: list[float] = field(init=False, factory=list)

    def compare(self, encoder: str, digests: Sequence[int]) -> None:
        """Compare the samples that have arrived with those that this rank was given."""
        if self.arrived is not None:
            (here, rank, header), self.arrived = self.arrived, None
            sent, mine = (rank, header.digests), (here, digests)
            refuse_other_samples(encoder, header.microbatch, sent, mine)


class PendingAssignments:
    """A model's: a trainer puts them in, the bridge takes one out a microbatch.

    What is put in for an encoder that no bridge on this rank asks for is dropped; a rank that holds
    the encoder must not run then.

    Attributes:
        microbatch: number in its pass of the microbatch that the model runs, or has run last.
    """

    def __init__(self) -> None:
        self._pending: defaultdict[str, _Pending] = defaultdict(_Pending)
        self._set_aside: defaultdict[str, _Pending] = defaultdict(_Pending)
        self._taken: set[str] = set()
        self._compared: set[str] = set()
        self._not_taken: ImageAssignment | None = None
        self._keeps = self._repeats = False
        self.microbatch = -1

    def open(self, encoders: Iterable[str]) -> None:
        """From now on a bridge takes these encoders' assignments out."""
        self._taken.update(encoders)

    def expect(self, encoder: str) -> None:
        """From now on an encoder's samples arrive on this rank."""
        self._compared.add(encoder)

    def begin_pass(self, *, keeps: bool = False, repeats: bool = False) -> None:
        """The schedule begins: microbatches are counted from 0.

        Args:
            keeps: its microbatches will come once more.
            repeats: they do.
        """
        self.microbatch, self._keeps, self._repeats = -1, keeps, repeats

    def end_step(self) -> None:
        """Both passes are over: what is assigned from now on is of another step."""
        for each in self._pending.values():
            if self._keeps:  # an exception has cut the first one short, and nobody takes these
                gone = set(map(id, each.made))
                each.to_take = deque(one for one in each.to_take if id(one) not in gone)
            each.made.clear()
            each.carried.clear()
        self._keeps = self._repeats = False

    def begin_forward(self, _: Any = None) -> None:
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
        self.microbatch += 1
        for each in self._pending.values():
            each.may_be_given = False

    def carried(self, encoder: str) -> Sequence[float] | None:
        """What each data-parallel rank was given since the last step, at cost; None for nothing."""
        return self._pending[encoder].carried or None

    def made_before(self, encoder: str) -> ImageAssignment | None:
        """What this microbatch's first call made, if this is its second."""
        made = self._pending[encoder].made
        return made.popleft() if self._repeats and made else None

    def put(self, assignment: ImageAssignment) -> None:
        """The next microbatch's.

        Raises:
            RuntimeError: none was taken out for very long.
        """
        name, loads = assignment.module, assignment.loads
        pending = self._pending[name]
        before = pending.carried or [0.0] * len(loads)
        pending.carried = [sum(both) for both in zip(before, loads, strict=True)]
        if self._keeps:
            pending.made.append(assignment)
        if name in self._compared:
            if pending.arrived is not None and pending.may_be_given:
                pending.compare(name, assignment.sample_digests)
            else:
                pending.to_compare.append(assignment)
        if name not in self._taken:
            if assignment.dp_rank is not None and assignment.data_parallel_size > 1:
                self._not_taken = assignment
        elif len(pending.to_take) == MAX_PENDING:
            raise RuntimeError(
                f"assign_images was called for {MAX_PENDING} microbatches of {name} that never "
                f"ran: call it once a microbatch, before the model's forward"
            )
        else:
            pending.to_take.append(assignment)

    def arrived(self, encoder: str, here: int, rank: int, header: Header) -> None:
        """On rank ``here`` a rank's header of an encoder's next microbatch."""
        pending = self._pending[encoder]
        pending.arrived, pending.may_be_given = (here, rank, header), True
        if pending.to_compare and header.digests:
            pending.compare(encoder, pending.to_compare.popleft().sample_digests)

    def next(self, encoder: str) -> ImageAssignment | None:
        """What will be taken next, if anything."""
        to_take = self._pending[encoder].to_take
        return to_take[0] if to_take else None

    def is_assigned(self, encoder: str) -> bool:
        """Whether the images that an encoder is given now were dealt out by cost."""
        return bool(self._pending[encoder].to_take)

    def take(self, encoder: str) -> ImageAssignment | None:
        """That of the microbatch which runs now; None if its images stay with their slices."""
        pending = self._pending[encoder]
        if pending.to_take:
            return pending.to_take.popleft()
        pending.compare(encoder, ())  # what it was made of must have had none either
        return None

    def put_back(self, assignment: ImageAssignment) -> None:
        """What was taken is of the microbatch which runs now."""
        self._pending[assignment.module].to_take.appendleft(assignment)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, other microbatches run than those that these assignments were made for."""
        before, outer = self._pending, self._set_aside
        self._pending, self._set_aside = defaultdict(_Pending), before
        try:
            yield
        finally:
            self._pending, self._set_aside = before, outer
            for each in before.values():
                each.arrived = None

    def remark(self, encoder: str) -> str:
        """What may be behind a wrong number of tokens: calls that were made for another pass."""
        waiting = len(self._set_aside[encoder].to_take)
        if not waiting:
            return ""
        return (
            f"; {waiting} microbatches of {encoder} were assigned before evaluation(), and wait "
            f"for the training step behind it: call assign_images for what an evaluation runs "
            f"inside it, or make its loader there"
        )
