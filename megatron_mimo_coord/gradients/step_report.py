"""What ranks tell each other of each step, in the collective that the norms are in.

Some mistakes leave no trace on the ranks that make them, or none on the others. Whoever reads the
norms on the host sees them for nothing; if no optimizer of Megatron's does, they are looked at when
the next step begins, which then waits for the device:

- a loss function that returns no number of tokens, or that of other ranks' (``loss_check.py``);
- a rank that is given rows of samples that are not its own (``rows_read.py``);
- what does not fit in a microbatch, as a rank found it (``misfits.py``);
- ranks that read different samples (``texts_read.py``).

Each of these has numbers of its own, of which every rank is to know the largest.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.loss_check import LossCheck
from megatron_mimo_coord.gradients.misfits import Misfits
from megatron_mimo_coord.gradients.rows_read import RowsRead
from megatron_mimo_coord.gradients.texts_read import TextsRead
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.forwards import Given
from megatron_mimo_coord.world.device import world_device


class Part(Protocol):
    """What ranks tell each other of one thing."""

    @property
    def size(self) -> int:
        """How many numbers."""

    def fill(self, numbers: torch.Tensor) -> None:
        """Say them of the step that is over: in place of -inf, in fp64, on the world's device."""

    def check(self, largest: Sequence[float]) -> None:
        """Raise a RuntimeError, alike on every rank, if the largest of all ranks say so."""

    def forget(self) -> None:
        """Another step begins."""


class StepReport:
    """One rank's part of it.

    Args:
        job: the modules, and which of them are here.
        loss_check: looks at the losses.
        is_assigned: whether the images that an encoder is given now were dealt out by cost: a rank
            encodes others than its text says.
        is_read_again: whether a microbatch that the model is given now will come once more.

    Attributes:
        misfits: what this rank found.
        texts: what it reads in a step.
    """

    def __init__(
        self,
        job: Job,
        loss_check: LossCheck,
        is_assigned: Callable[[str], bool],
        is_read_again: Callable[[], bool],
    ) -> None:
        self._encoders = () if LANGUAGE in job.ddps else tuple(job.ddps)
        self._is_assigned = is_assigned
        self._is_read_again = is_read_again
        self._loss_check = loss_check
        self._rows = RowsRead(job)
        self.misfits = Misfits()
        self.texts = TextsRead(self._rows)
        # What others follow from comes before these.
        self._parts: Sequence[Part] = (loss_check, self._rows, self.misfits, self.texts)
        self._is_unread = False
        job.forwards.watch(self._look)

    def _look(self, given: Given) -> None:
        """Whose text the model is given."""
        if not torch.is_grad_enabled():
            return
        text: torch.Tensor | None = given.get("input_ids")
        is_packed = given.get("packing_kwargs") is not None
        if is_packed or any(map(self._is_assigned, self._encoders)):
            text = None
        self._rows.rows = None if text is None else len(text)
        if not self._is_read_again():
            self.texts.add({} if text is None else given)

    def finalized(self, num_tokens: torch.Tensor | None) -> None:
        """The step is over.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
        """
        self._is_unread = True
        self._loss_check.finalized(num_tokens)

    def pack(self) -> torch.Tensor:
        """Numbers of which each rank is to know the largest, in fp64 on the world's device."""
        self._is_unread = False
        sizes = [part.size for part in self._parts]
        numbers = torch.full((sum(sizes),), -torch.inf, dtype=torch.float64, device=world_device())
        for part, its in zip(self._parts, numbers.split(sizes), strict=True):
            part.fill(its)
        return numbers

    def check(self, largest: Sequence[float]) -> None:
        """Say what is wrong, alike on every rank. Collective if something is.

        Args:
            largest: of each number, over all ranks.

        Raises:
            RuntimeError: for any mistake.
        """
        numbers = iter(largest)
        for part in self._parts:
            part.check([*islice(numbers, part.size)])

    def begin(self) -> None:
        """Another step begins; if no optimizer of Megatron's has read of the last, this does.

        Raises:
            RuntimeError: as :meth:`check`.
        """
        if self._is_unread:
            numbers = self.pack()
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            self.check(numbers.tolist())
        for part in self._parts:
            part.forget()
