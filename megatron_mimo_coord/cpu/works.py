"""Works in flight: each must be waited for before its tensors are used."""

from typing import Any

import torch
from attrs import define, field, frozen

from megatron_mimo_coord.cpu.launches import Launch
from megatron_mimo_coord.cpu.location import caller


@define(eq=False)
class InFlight:
    """A launch that nobody has waited for, or a part of a batch."""

    launch: Launch
    work: Any
    storages: list[Any]  # kept alive: their identity is looked up
    futures: list[Any] = field(factory=list)
    is_finished: bool = False


@frozen
class Use:
    """Bytes of a storage that a work reads or writes."""

    first: int
    behind: int
    is_written: bool
    by: InFlight


class Works:
    """Everything that this rank has launched and not waited for.

    Attributes:
        in_flight: what nobody waited for, by the identity of its work.
        problems: uses of tensors whose work was not waited for.
    """

    def __init__(self) -> None:
        self.in_flight: dict[int, InFlight] = {}
        self._uses: dict[int, list[Use]] = {}  # by the identity of the storage
        self._finished: dict[int, Any] = {}
        self._seen_at_last_step: set[int] = set()
        self.problems: list[str] = []

    def add(self, work: Any, launch: Launch, part: Launch) -> InFlight:
        """A launch has begun, or a part of a batch."""
        tensors = (*part.reads, *part.writes)
        each = InFlight(launch, work, [tensor.untyped_storage() for tensor in tensors])
        self.in_flight[id(work)] = each
        for index, tensor in enumerate(tensors):
            use = Use(*_bytes_of(tensor), index >= len(part.reads), each)
            self._uses.setdefault(id(each.storages[index]), []).append(use)
        return each

    def waited_for(self, work: Any) -> InFlight | None:
        """Somebody waits for a work: what it belongs to, if it was in flight."""
        each = self.in_flight.pop(id(work), None)
        for storage in each.storages if each else ():
            left = [use for use in self._uses.pop(id(storage), ()) if use.by is not each]
            if left:
                self._uses[id(storage)] = left
        return each

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
            uses = self._uses.get(id(tensor.untyped_storage()))
            if not uses:
                continue
            first, behind = _bytes_of(tensor)
            for use in list(uses):
                if not (is_written or use.is_written):
                    continue
                if first >= use.behind or use.first >= behind:
                    continue
                if use.by.launch.group.name == group:
                    earlier.append(use.by)
                elif id(use.by.work) in self.in_flight:
                    self._note(use.by, "written" if is_written else "used")
        return earlier

    def _note(self, each: InFlight, how: str) -> None:
        self.waited_for(each.work)
        self.problems.append(
            f"rank {each.launch.rank}: nobody waited for {each.launch} before its tensor was {how} "
            f"at {caller()}"
        )

    def end_step(self) -> list[str]:
        """The problems of a step. What stays in flight untouched for a whole step is forgotten."""
        for key in self._seen_at_last_step & set(self.in_flight):
            work = self.in_flight[key].work
            if self.in_flight[key].is_finished:
                self._finished[key] = work
            self.waited_for(work)
        self._seen_at_last_step = set(self.in_flight)
        problems, self.problems = self.problems, []
        return problems


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte in its storage, and the one behind the last."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    if not tensor.numel():
        return first, first
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(last) + 1) * size


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
