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

from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import loss_mask_of

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
NUMBERS = 4
"""That each rank says, of which the largest counts."""
_EXACT = 1e-3


class LossCheck:
    """Looks at the gradients of a rank's losses. Nothing waits for the device.

    Args:
        language: grid of the language model.
        per_token: whether the loss is divided by the number of tokens.
        scaled: what the schedule does to a loss, if it scales it.
        model: whose output the loss is computed from.
        changes: where is recorded that its output is watched.
    """

    def __init__(
        self,
        language: ModuleGrid,
        per_token: bool,
        scaled: Callable[[torch.Tensor], torch.Tensor],
        model: torch.nn.Module,
        changes: Changes,
    ) -> None:
        self._context_parallel_size = language.dim("cp")
        self._per_token = per_token
        self._scaled = scaled
        self._seen: list[torch.Tensor] = []  # of each microbatch, what ``_look`` makes of it
        changes.on_close(model.register_forward_hook(self._watch, with_kwargs=True).remove)

    def _watch(self, _: Any, args: Any, kwargs: Mapping[str, Any], returned: Any) -> None:
        losses, mask = returned if isinstance(returned, tuple) else (returned, None)
        if isinstance(losses, torch.Tensor) and losses.requires_grad:
            losses.register_hook(partial(self._look, loss_mask_of(args, kwargs), mask))

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

    def finalized(self, num_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """The step is over: what this rank says of it, on the device; None if it saw no loss.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
        """
        if not self._seen:
            return None
        norm, factor, whole, here = torch.stack(self._seen).unbind(1)
        self.forget()
        numbers = norm.new_zeros(NUMBERS)
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
        return numbers


def _are_close(numbers: torch.Tensor, value: float) -> torch.Tensor:
    return (numbers - value).abs() <= _EXACT * value


def mistake(numbers: Sequence[float]) -> str:
    """What is wrong, by the largest that any rank said; empty if nothing is."""
    is_counted, has_gradient, whole_mask, multiplied = (number > 0 for number in numbers)
    found = has_gradient and not is_counted, whole_mask, multiplied
    return next((text for text, is_so in zip(_MISTAKES, found, strict=True) if is_so), "")
