"""What a loss function made of the losses, told by the gradient that comes back to them.

Megatron's schedule counts 0 tokens where a loss function returns no count; a gradient at the losses
tells that from tokens that are all masked, whatever auxiliary losses add behind them.

With context parallelism the model returns losses and mask of this rank's positions. Whoever counts
the tokens of the mask that the model was given counts those of all. A mean loss is then divided by
other tokens than its own, and one that is returned without their number is multiplied by CP, as
Megatron's schedule does for loss functions that divide by the tokens of all positions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.num_tokens import holds_a_distinct_count
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.forwards import named

_CURE = "take the mask that the model returns, losses, loss_mask = model(...), for losses and count"
_MISTAKES = (
    "the loss is per token, but no rank reported a number of tokens, and the loss has a gradient, "
    "which it would not have if all tokens were masked: return (loss, num_tokens, report) from the "
    "loss function, with the sum of the losses and the number of unmasked tokens of the microbatch",
    "a rank counted the tokens of the whole loss mask, but its losses are those of its own "
    f"positions, as context parallelism cuts them: {_CURE}",
    "the loss function returned the mean over one rank's positions without their number, and "
    "Megatron's schedule multiplies such a loss by the CP of the language model: return (loss, "
    f"num_tokens, report), with the sum of the losses; {_CURE}",
)
_IS_COUNTED, _HAS_GRADIENT, _WHOLE_MASK, _MULTIPLIED = range(4)
_EXACT = 1e-3


class LossCheck:
    """Looks at the gradients of a rank's losses: a part of its report.

    Nothing waits for the device.

    Args:
        job: whose model's output the loss is computed from.
        scaled: what the schedule does to a loss, if it scales it.

    Attributes:
        size: how many numbers ranks tell each other.
    """

    size = 4

    def __init__(self, job: Job, scaled: Callable[[torch.Tensor], torch.Tensor]) -> None:
        language = job.grids[LANGUAGE]
        self._context_parallel_size = language.dim("cp")
        self._per_token = job.per_token
        self._scaled = scaled
        self._seen: list[torch.Tensor] = []  # of each microbatch, what ``_look`` makes of it
        self._numbers: torch.Tensor | None = None
        if holds_a_distinct_count(language, job.rank) and (
            job.per_token or self._context_parallel_size > 1
        ):
            job.changes.on_close(
                job.model.register_forward_hook(self._watch, with_kwargs=True).remove
            )

    def _watch(self, _: Any, args: Any, kwargs: Mapping[str, Any], returned: Any) -> None:
        losses, mask = returned if isinstance(returned, tuple) else (returned, None)
        if isinstance(losses, torch.Tensor) and losses.requires_grad:
            whole = named(args, kwargs).get("loss_mask")
            losses.register_hook(partial(self._look, whole, mask))

    def _look(self, whole: Any, mask: Any, gradient: torch.Tensor) -> None:
        """The norm of a gradient; the largest, if tokens that count have all the same; tokens."""
        found = gradient.new_zeros(4, dtype=torch.float64)
        found[0] = torch.linalg.vector_norm(gradient)
        if torch.is_tensor(whole) and torch.is_tensor(mask) and whole.shape != mask.shape:
            found[2], found[3] = whole.sum(), mask.sum()
            if gradient.shape == mask.shape:
                largest = gradient.max()
                is_mean = ((gradient - mask * largest).abs() <= _EXACT * largest).all()
                found[1] = torch.where(is_mean, largest, 0)
        self._seen.append(found)

    def forget(self) -> None:
        """Another step begins."""
        self._seen.clear()

    def finalized(self, num_tokens: torch.Tensor | None) -> None:
        """The step is over.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
        """
        self._numbers = None
        if not self._seen:
            return
        norm, factor, whole, here = torch.stack(self._seen).unbind(1)
        self.forget()
        self._numbers = numbers = norm.new_zeros(self.size)
        is_cut = whole != here
        if self._per_token:
            counted = norm.new_zeros(()) if num_tokens is None else num_tokens.reshape(()).double()
            numbers[_IS_COUNTED], numbers[_HAS_GRADIENT] = counted > 0, (norm > 0).any()
            numbers[_WHOLE_MASK] = (counted == whole.sum()) & is_cut.any()
        else:
            scale = self._scaled(torch.ones(1, device=norm.device)).reshape(())
            share = factor * len(norm) / scale  # 1 / the tokens that losses were divided by
            numbers[_WHOLE_MASK] = (is_cut & _are_close(share * whole, 1)).any()
            multiplied = _are_close(share * here, self._context_parallel_size)
            numbers[_MULTIPLIED] = (is_cut & multiplied).any()

    def fill(self, numbers: torch.Tensor) -> None:
        """Say what was seen, if a loss was."""
        if self._numbers is not None:
            numbers[:], self._numbers = self._numbers, None

    def check(self, largest: Sequence[float]) -> None:
        """Refuse losses that the gradients show to be wrong."""
        is_counted, has_gradient, whole_mask, multiplied = (number > 0 for number in largest)
        found = has_gradient and not is_counted, whole_mask, multiplied
        for mistake, is_so in zip(_MISTAKES, found, strict=True):
            if is_so:
                raise RuntimeError(mistake)


def _are_close(numbers: torch.Tensor, value: float) -> torch.Tensor:
    return (numbers - value).abs() <= _EXACT * value
