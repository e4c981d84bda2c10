"""N, the unmasked tokens of the global batch that a per-token loss is divided by."""

import torch
import torch.distributed as dist

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.world.device import world_device


class NumTokens:
    """Sums what the ranks counted, in one collective of one number."""

    def __init__(self, job: Job) -> None:
        language = job.grids[LANGUAGE]
        self._per_token = job.per_token
        self._is_needed_here = job.per_token and LANGUAGE in job.ddps
        self._is_counted_here = job.per_token and holds_a_distinct_count(language, job.rank)
        self._sum = torch.zeros((), dtype=torch.int64, device=world_device())

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
        return dist.all_reduce(self._sum, async_op=True)

    def reciprocal(self) -> torch.Tensor:
        """1/N, a tensor without dims on the device; 1 where no token counts."""
        return self._sum.clamp(min=1).reciprocal()


def holds_a_distinct_count(language: ModuleGrid, rank: int) -> bool:
    """Ranks that differ in more than DP and CP hold the same count: the first of them counts."""
    return language.is_on_last_stage(rank) and all(
        language.coordinate(rank, dim) == 0
        for dim in language.dim_names
        if dim not in ("dp", "cp", "pp")
    )
