"""What ranks tell each other before each optimizer step, in the collective that the norms are in.

Two mistakes leave no trace on the ranks that make them, or none on the others. Whoever reads the
norms on the host sees them for nothing:

- a loss function that returns no number of tokens, where the loss is per token
  (``num_tokens.py``);
- an encoder's rank that is given the ``input_ids`` of a whole microbatch, or of another module's
  larger slice, where its own belongs: then it has just as many rows as that. Other numbers of rows
  are the trainer's affair: most layouts never read them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import input_ids_of
from megatron_mimo_coord.world.device import world_device

_MISSES_TOKENS = (
    "the loss is per token, but no rank reported a number of tokens, and the loss has a gradient, "
    "which it would not have if all tokens were masked: return (loss, num_tokens, report) from the "
    "loss function, with the sum of the losses and the number of unmasked tokens of the microbatch"
)


@define
class StepReport:
    """One rank's part of it.

    Args:
        data_parallel_sizes: DP of every module of the job, in one order on every rank.
        here: modules on this rank.

    Attributes:
        misses_tokens: whether nobody counted the tokens of the step, on the device; None where the
            loss is no sum of tokens, or this was looked at.
        rows: of the last ``input_ids`` that this rank's modules were given; None if there were
            none, or their rows are no samples.
    """

    data_parallel_sizes: Mapping[str, int]
    here: Sequence[str]
    misses_tokens: torch.Tensor | None = field(default=None, init=False)
    rows: int | None = field(default=None, init=False)

    def watch(
        self, model: torch.nn.Module, is_assigned: Callable[[str], bool], changes: Changes
    ) -> None:
        """Look at the text that a model is given.

        Args:
            model: the model.
            is_assigned: whether the images that an encoder is given now were dealt out by cost: a
                rank encodes others than its text says.
            changes: where that is recorded.
        """

        def look(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if torch.is_grad_enabled():
                input_ids = input_ids_of(args, kwargs)
                is_packed = kwargs.get("packing_kwargs") is not None
                others = LANGUAGE not in self.here and any(map(is_assigned, self.here))
                has_rows = input_ids is not None and not is_packed and not others
                self.rows = len(input_ids) if has_rows else None

        changes.on_close(model.register_forward_pre_hook(look, with_kwargs=True).remove)

    def pack(self) -> torch.Tensor:
        """Numbers of which each rank is to know the largest, in fp32 on the world's device."""
        modules = list(self.data_parallel_sizes)
        numbers = torch.full((1 + 2 * len(modules),), -torch.inf, device=world_device())
        if self.misses_tokens is not None:
            numbers[0], self.misses_tokens = self.misses_tokens, None
        for name in self._readers():
            assert self.rows is not None
            samples = self.rows * self.data_parallel_sizes[name]
            index = 1 + 2 * modules.index(name)
            numbers[index], numbers[index + 1] = samples, -samples
        return numbers

    def _readers(self) -> Sequence[str]:
        """The modules whose samples the rows are."""
        if self.rows is None:
            return []
        if LANGUAGE in self.here:
            return [LANGUAGE]
        fewest = min(self.data_parallel_sizes[name] for name in self.here)
        return [name for name in self.here if self.data_parallel_sizes[name] == fewest]

    def check_tokens(self) -> None:
        """Look at the last step's, if no optimizer of Megatron's has: only then this waits.

        Raises:
            RuntimeError: nobody counted its tokens; on all ranks alike.
        """
        misses_tokens, self.misses_tokens = self.misses_tokens, None
        if misses_tokens is not None and misses_tokens:
            raise RuntimeError(_MISSES_TOKENS)

    def check(self, numbers: Sequence[float]) -> None:
        """Say what is wrong, alike on every rank.

        Args:
            numbers: the largest of each, over all ranks.

        Raises:
            RuntimeError: for either mistake.
        """
        if numbers[0] > 0:
            raise RuntimeError(_MISSES_TOKENS)
        most, least = numbers[1::2], [-number for number in numbers[2::2]]
        said = dict(zip(self.data_parallel_sizes, zip(least, most, strict=True), strict=True))
        for name, samples in said.items():
            wrong = self._rows_of_others(name, *said[LANGUAGE])
            rows = {number / self.data_parallel_sizes[name] for number in samples} & wrong
            if rows:
                raise RuntimeError(
                    f"by its input_ids, module {name!r} has other samples than the language model: "
                    f"{max(rows):.0f} on each of DP {self.data_parallel_sizes[name]}, where a "
                    f"microbatch has {said[LANGUAGE][1]:.0f} in all: give each rank of {name!r} "
                    f"its slice, "
                    f"input_ids[coordinator.data_parallel_slice(micro_batch_size, {name!r})]"
                )

    def _rows_of_others(self, name: str, least: float, most: float) -> set[float]:
        """Rows of the whole microbatch and of larger slices than a module's.

        Args:
            name: the module.
            least, most: samples of a microbatch by the language model's rows on any rank.
        """
        if least != most:
            return set()
        sizes = {1, *self.data_parallel_sizes.values()}
        return {most / size for size in sizes if size < self.data_parallel_sizes[name]}
