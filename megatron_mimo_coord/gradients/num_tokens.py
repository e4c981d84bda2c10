"""N, the unmasked tokens of the global batch that a per-token loss is divided by."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import loss_mask_of

_HAS_GRADIENT = 1 << 36
"""Added to a rank's count if its loss has a gradient: more tokens than any step has."""
_IS_OF_WHOLE_MASK = 1 << 50
"""Added to it if it is that of the mask that the model cut: more than all gradients add."""


class NumTokens:
    """Sums what the ranks counted, in one collective of one number.

    Megatron's schedule counts 0 where the loss function returns no count. The gradient that reaches
    the model's output tells that from tokens that are all masked: theirs is 0, or NaN,
    whatever auxiliary losses add to the gradients behind it.

    With context parallelism the model returns losses and mask of this rank's positions. A loss
    function that counts the tokens of the mask that the model was given counts those of all.

    Args:
        language: grid of the language model.
        rank: this rank.
        per_token: whether the loss is divided by the number of tokens.
        device: where the backend of the world expects tensors.
        model: whose output the loss is computed from.
        changes: where is recorded that its output is watched.
    """

    def __init__(
        self,
        language: ModuleGrid,
        rank: int,
        per_token: bool,
        device: torch.device,
        model: torch.nn.Module,
        changes: Changes,
    ) -> None:
        self._per_token = per_token
        self._is_needed_here = per_token and rank in language.ranks
        self._is_counted_here = per_token and holds_a_distinct_count(language, rank)
        self._sum = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_gradient: torch.Tensor | None = None
        self._masks: torch.Tensor | None = None
        if self._is_counted_here:
            changes.on_close(
                model.register_forward_hook(self._watch_output, with_kwargs=True).remove
            )

    def _watch_output(self, _: Any, args: Any, kwargs: Any, returned: Any) -> None:
        output, mask = returned if isinstance(returned, tuple) else (returned, None)
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(self._keep_norm)
            whole = loss_mask_of(args, kwargs)
            if whole is not None and mask is not None and whole.shape != mask.shape:
                counts = torch.stack((whole.sum(), mask.sum()))
                self._masks = counts if self._masks is None else self._masks + counts

    def _keep_norm(self, gradient: torch.Tensor) -> None:
        self._loss_gradient = torch.linalg.vector_norm(gradient)

    def check(self, num_tokens: torch.Tensor | None) -> None:
        """Refuse a count that is missing where the loss is per token, or the reverse."""
        missing = self._is_needed_here and num_tokens is None
        if missing or (num_tokens is not None and not self._per_token):
            raise ValueError(
                f"the language model's calculate_per_token_loss is {self._per_token}, but "
                f"num_tokens is {'missing' if num_tokens is None else 'given'}: pass num_tokens "
                f"just when the loss is per token (the schedule does so by itself)"
            )

    def start(self, num_tokens: torch.Tensor | None) -> dist.Work | None:
        """Launch the sum over the world; None if the loss is a mean.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
        """
        if not self._per_token:
            return None
        if self._is_counted_here and num_tokens is not None:
            self._sum.copy_(num_tokens.reshape(()))
        else:
            self._sum.zero_()
        if self._loss_gradient is not None:
            self._sum += (self._loss_gradient > 0) * _HAS_GRADIENT
            self._loss_gradient = None
        if self._masks is not None and num_tokens is not None:
            whole, here = self._masks
            self._masks = None
            is_of_whole = (num_tokens.reshape(()) == whole) & (whole != here)
            self._sum += is_of_whole * _IS_OF_WHOLE_MASK
        return dist.all_reduce(self._sum, async_op=True)

    def reciprocal(self) -> torch.Tensor:
        """1/N, a tensor without dims on the device; 1 where no token counts."""
        return (self._sum % _HAS_GRADIENT).clamp(min=1).reciprocal()

    def mistakes(self) -> torch.Tensor:
        """On the device, of all ranks: [is missing, is of the whole mask].

        It is missing where no rank counted a token and yet the loss has a gradient.
        """
        has_gradient = self._sum % _IS_OF_WHOLE_MASK >= _HAS_GRADIENT
        is_missing = has_gradient & (self._sum % _HAS_GRADIENT == 0)
        return torch.stack((is_missing, self._sum >= _IS_OF_WHOLE_MASK))


def holds_a_distinct_count(language: ModuleGrid, rank: int) -> bool:
    """Ranks that differ in more than DP and CP hold the same count: the first of them counts."""
    return language.is_on_last_stage(rank) and all(
        language.coordinate(rank, dim) == 0
        for dim in language.dim_names
        if dim not in ("dp", "cp", "pp")
    )
