"""What is wrong with a microbatch, as a rank found it, and the sentence about it."""

import json
from collections.abc import Callable, Sequence

import torch
from attrs import frozen

from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text


@frozen
class Misfit:
    """Something that all ranks are to hear of.

    Args:
        order: the lowest is told: (-1, ...) for what is so in every microbatch, else (microbatch,
            ...), of one microbatch what others follow from before these: -1 for a text that ranks
            cannot share, 0 for tokens of which nobody knows whose they are, 1 for other tokens.
        sentence: says what is wrong and what to change; one that must be asked for is asked once
            the step is over.
        is_so: on the device; None if the host knows that it is.
    """

    order: tuple[int, ...]
    sentence: str | Callable[[], str]
    is_so: torch.Tensor | None = None

    @property
    def text(self) -> str:
        """The sentence."""
        return self.sentence if isinstance(self.sentence, str) else self.sentence()

    @property
    def holds(self) -> bool:
        """Whether it is so; waits for the device where only that knows."""
        return self.is_so is None or bool(self.is_so)


class Misfits:
    """Those that this rank found in a step: a part of its report.

    Attributes:
        size: how many numbers ranks tell each other.
    """

    size = 1

    def __init__(self) -> None:
        self._found: list[Misfit] = []

    def tell(self, misfit: Misfit) -> None:
        """A microbatch does not fit: every rank is told once the step is over.

        Raises:
            RuntimeError: it is an evaluation, after which nobody is.
        """
        if torch.is_grad_enabled():
            self.add(misfit)
        elif misfit.holds:
            raise RuntimeError(misfit.text)

    def add(self, misfit: Misfit) -> None:
        """Every rank is told of it with the norms of this step."""
        self._found.append(misfit)

    def fill(self, numbers: torch.Tensor) -> None:
        """Say how many there are."""
        numbers[0] = 0
        for each in self._found:
            numbers[0] += 1 if each.is_so is None else each.is_so

    def check(self, largest: Sequence[float]) -> None:
        """Refuse the first of all ranks'. Collective if there is one."""
        found, self._found = self._found, []
        if largest[0] > 0:
            mine = [(each.order, each.text) for each in found if each.holds]
            texts = all_gather_text(json.dumps(mine), device=world_device())
            _, told = min(each for text in texts for each in json.loads(text))
            raise RuntimeError(told)

    def forget(self) -> None:
        """Another step begins."""
        self._found.clear()
