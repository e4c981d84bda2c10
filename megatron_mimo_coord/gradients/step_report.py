"""What ranks tell each other of each step, in the collective that the norms are in.

Some mistakes leave no trace on the ranks that make them, or none on the others. Whoever reads the
norms on the host sees them for nothing; if no optimizer of Megatron's does, they are looked at when
the next step begins, which then waits for the device:

- a loss function that returns no number of tokens, or that of other ranks' (``loss_check.py``);
- a rank that is given the ``input_ids`` of a whole microbatch, or of another module's larger slice,
  where its own belongs: then it has just as many rows as that. Other numbers of rows are the
  trainer's affair: most layouts never read them;
- ranks that read different samples (``texts_read.py``);
- texts that have other numbers of an encoder's tokens than the encoder made, do not say how many of
  them are for whom, or cannot be shared by the ranks that read parts of them, and the like
  (``misfits.py``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field

from megatron_mimo_coord.gradients.loss_check import NUMBERS, LossCheck, mistake
from megatron_mimo_coord.gradients.misfits import Misfit
from megatron_mimo_coord.gradients.texts_read import TextsRead
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import input_ids_of, labels_of, packing_of
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text

_MODULES = NUMBERS + 1
"""Where what is said of each module begins."""


@define
class StepReport:
    """One rank's part of it.

    Args:
        data_parallel_sizes: DP of every module of the job, in one order on every rank.
        here: modules on this rank, and which of their DP ranks it is.
        loss_check: looks at the losses that this rank has, if it counts their tokens.

    Attributes:
        texts: what this rank reads in a step.
    """

    data_parallel_sizes: Mapping[str, int]
    here: Mapping[str, int]
    loss_check: LossCheck | None = None
    _rows: int | None = field(default=None, init=False)  # of the last input_ids, if samples
    _is_unread: bool = field(default=False, init=False)
    _of_loss: torch.Tensor | None = field(default=None, init=False)
    _misfits: list[Misfit] = field(factory=list, init=False)
    texts: TextsRead = field(init=False)

    def __attrs_post_init__(self) -> None:
        places = {(self.data_parallel_sizes[name], self.here[name]) for name in self._readers}
        self.texts = TextsRead(self.data_parallel_sizes, places.pop() if len(places) == 1 else None)

    @property
    def _readers(self) -> Sequence[str]:
        """The modules here whose samples the rows of ``input_ids`` are."""
        if LANGUAGE in self.here:
            return [LANGUAGE]
        fewest = min(self.data_parallel_sizes[name] for name in self.here)
        return [name for name in self.here if self.data_parallel_sizes[name] == fewest]

    def tell(self, misfit: Misfit) -> None:
        """A microbatch does not fit: every rank is told once the step is over.

        Raises:
            RuntimeError: it is an evaluation, after which nobody is.
        """
        if torch.is_grad_enabled():
            self.add(misfit)
        elif misfit.holds:
            raise RuntimeError(misfit.sentence())

    def dp_rank(self, encoder: str) -> int:
        """DP rank of the module here whose texts an encoder's tokens are compared with."""
        return self.here[LANGUAGE if LANGUAGE in self.here else encoder]

    def add(self, misfit: Misfit) -> None:
        """Every rank is told of it with the norms of this step."""
        self._misfits.append(misfit)

    def finalized(self, num_tokens: torch.Tensor | None) -> None:
        """The step is over.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
        """
        self._is_unread = True
        self._of_loss = self.loss_check.finalized(num_tokens) if self.loss_check else None

    def watch(
        self,
        model: torch.nn.Module,
        is_assigned: Callable[[str], bool],
        is_read_again: Callable[[], bool],
        changes: Changes,
    ) -> None:
        """Look at the text that a model is given.

        Args:
            model: the model.
            is_assigned: whether the images that an encoder is given now were dealt out by cost: a
                rank encodes others than its text says.
            is_read_again: whether a microbatch that is given now will come once more.
            changes: where that is recorded.
        """

        def look(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if torch.is_grad_enabled():
                input_ids = input_ids_of(args, kwargs)
                is_packed = packing_of(args, kwargs) is not None
                others = LANGUAGE not in self.here and any(map(is_assigned, self.here))
                has_rows = input_ids is not None and not is_packed and not others
                self._rows = len(input_ids) if has_rows else None
                if not is_read_again():
                    given = {"input_ids": input_ids, "labels": labels_of(args, kwargs)}
                    self.texts.add(given if has_rows else {})

        changes.on_close(model.register_forward_pre_hook(look, with_kwargs=True).remove)

    def pack(self) -> torch.Tensor:
        """Numbers of which each rank is to know the largest, in fp64 on the world's device."""
        self._is_unread = False
        modules = list(self.data_parallel_sizes)
        size, device = _MODULES + 2 * len(modules), world_device()
        numbers = torch.full((size,), -torch.inf, dtype=torch.float64, device=device)
        if self._of_loss is not None:
            numbers[:NUMBERS], self._of_loss = self._of_loss, None
        numbers[NUMBERS] = 0
        for each in self._misfits:
            numbers[NUMBERS] += 1 if each.is_so is None else each.is_so
        if self._rows is not None:
            for name in self._readers:
                samples = self._rows * self.data_parallel_sizes[name]
                index = _MODULES + 2 * modules.index(name)
                numbers[index], numbers[index + 1] = samples, -samples
        return torch.cat((numbers, self.texts.pack()))

    def begin(self) -> None:
        """Another step begins; if no optimizer of Megatron's has read of the last, this does.

        Raises:
            RuntimeError: as :meth:`check`.
        """
        if self._is_unread:
            numbers = self.pack()
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            self.check(numbers.tolist())
        self.texts.forget()
        self._misfits.clear()
        if self.loss_check is not None:
            self.loss_check.forget()

    def check(self, numbers: Sequence[float]) -> None:
        """Say what is wrong, alike on every rank.

        Args:
            numbers: the largest of each, over all ranks.

        Raises:
            RuntimeError: for any mistake.
        """
        misfits, self._misfits = self._misfits, []
        of_loss = mistake(numbers[:NUMBERS])
        if of_loss:
            raise RuntimeError(of_loss)
        end = _MODULES + 2 * len(self.data_parallel_sizes)
        most, least = numbers[_MODULES:end:2], [-each for each in numbers[_MODULES + 1 : end : 2]]
        said = dict(zip(self.data_parallel_sizes, zip(least, most, strict=True), strict=True))
        for name, samples in said.items():
            for other, (fewest, total) in said.items():
                if name != other and LANGUAGE in (name, other) and fewest == total > 0:
                    self._check_rows(name, samples, total)
        if numbers[NUMBERS] > 0:
            raise RuntimeError(_told(misfits))
        read = {number for samples in said.values() for number in samples}
        if len([*filter(isfinite, read)]) == 1:
            self.texts.check(list(numbers[end:]))

    def _check_rows(self, name: str, samples: tuple[float, float], total: float) -> None:
        """Refuse rows of the whole microbatch, or of larger slices than the module's.

        Args:
            name: the module.
            samples: of a microbatch, by its rows: the fewest and the most of any rank.
            total: the same by those of another module, on all of its ranks alike.
        """
        size = self.data_parallel_sizes[name]
        others = {total / each for each in (1, *self.data_parallel_sizes.values()) if each < size}
        rows = others & {number / size for number in samples}
        if rows:
            raise RuntimeError(
                f"by its input_ids, module {name!r} has other samples than "
                f"{'an encoder' if name == LANGUAGE else 'the language model'}: "
                f"{max(rows):.0f} on each of DP {size}, where a microbatch has {total:.0f} in all: "
                f"give each rank of {name!r} its slice, "
                f"input_ids[coordinator.data_parallel_slice(micro_batch_size, {name!r})]"
            )


def _told(misfits: Sequence[Misfit]) -> str:
    """The first of all ranks' misfits, one with a text that was cut before others. Collective."""
    mine = [(each.order, each.sentence()) for each in misfits if each.holds]
    texts = all_gather_text(json.dumps(mine), device=world_device())
    _, told = min(each for text in texts for each in json.loads(text))
    return told
