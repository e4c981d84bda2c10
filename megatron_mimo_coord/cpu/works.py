"""Works in flight: each must be waited for before its tensors are used."""

from typing import Any

import torch
from attrs import define, field

from megatron_mimo_coord.cpu.launches import Launch
from megatron_mimo_coord.cpu.location import caller

Range = tuple[int, int, int]  # (storage, first byte, byte behind the last)


@define(eq=False)
class InFlight:
    """A launch that nobody has waited for, or a part of a batch."""

    launch: Launch
    work: Any
    reads: list[Range]
    writes: list[Range]
    storages: list[Any]  # kept alive: their identity is in the ranges
    futures: list[Any] = field(factory=list)
    is_finished: bool = False


class Works:
    """Everything that this rank has launched and not waited for.

    Attributes:
        in_flight: what nobody waited for, by the identity of its work.
        problems: uses of tensors whose work was not waited for.
    """

    def __init__(self) -> None:
        self.in_flight: dict[int, InFlight] = {}
        self._finished: dict[int, Any] = {}
        self._seen_at_last_step: set[int] = set()
        self.problems: list[str] = []

    def add(self, work: Any, launch: Launch, part: Launch) -> InFlight:
        """A launch has begun, or a part of a batch."""
        each = InFlight(
            launch=launch,
            work=work,
            reads=[_bytes_of(tensor) for tensor in part.reads],
            writes=[_bytes_of(tensor) for tensor in part.writes],
            storages=[tensor.untyped_storage() for tensor in (*part.reads, *part.writes)],
        )
        self.in_flight[id(work)] = each
        return each

    def waited_for(self, work: Any) -> InFlight | None:
        """Somebody waits for a work: what it belongs to, if it was in flight."""
        return self.in_flight.pop(id(work), None)

    def is_finished(self, work: Any) -> bool:
        """Whether a launch that blocked has waited for it: gloo would wait for ever a second time.

        Asked of what :meth:`waited_for` does not know.
        """
        return self._finished.pop(id(work), None) is not None

    def of_future(self, future: Any) -> InFlight | None:
        """What a future of ``Work.get_future`` belongs to, if it is in flight."""
        for each in self.in_flight.values():
            if any(future is other for other in each.futures):
                return each
        return None

    def check_use(
        self, tensors: list[tuple[torch.Tensor, bool]], group: str = ""
    ) -> list[InFlight]:
        """Note a problem if a work in flight writes what is used here, or reads what is written.

        Args:
            tensors: what an operator uses, each with whether it writes to it.
            group: name of the group that it launches on: launches on one group keep their order.

        Returns:
            What was launched before on that group and uses the same memory.
        """
        earlier = []
        for tensor, is_written in tensors:
            used = _bytes_of(tensor)
            for each in list(self.in_flight.values()):
                busy = each.writes + each.reads if is_written else each.writes
                if not any(_overlap(used, other) for other in busy):
                    continue
                if each.launch.group.name == group:
                    earlier.append(each)
                else:
                    self._note(each, "written" if is_written else "used")
        return earlier

    def _note(self, each: InFlight, how: str) -> None:
        self.in_flight.pop(id(each.work))
        self.problems.append(
            f"rank {each.launch.rank}: nobody waited for {each.launch} before its tensor was {how} "
            f"at {caller()}"
        )

    def end_step(self) -> list[str]:
        """The problems of a step. What stays in flight untouched for a whole step is forgotten."""
        for key in self._seen_at_last_step & set(self.in_flight):
            forgotten = self.in_flight.pop(key)
            if forgotten.is_finished:
                self._finished[key] = forgotten.work
        self._seen_at_last_step = set(self.in_flight)
        problems, self.problems = self.problems, []
        return problems


def _bytes_of(tensor: torch.Tensor) -> Range:
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (int(last) + 1) * size if tensor.numel() else start
    return id(tensor.untyped_storage()), start, end


def _overlap(one: Range, other: Range) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


works = Works()


def end_of_step() -> None:
    """Tell what a rehearsal found out since it was last asked.

    A rehearsal calls it by itself before each ``step`` of a PyTorch optimizer and before a process
    group is destroyed. A trainer without either calls it at the end of a step.

    Raises:
        RuntimeError: a tensor was used before anybody waited for the work that fills it.

    Example:
        >>> end_of_step()
    """
    problems = works.end_step()
    if problems:
        raise RuntimeError("\n".join(["in this step", *problems]))
