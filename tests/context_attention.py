"""Causal attention over sequences that context-parallel ranks share, for ranks without a GPU.

Megatron's own for the CPU refuses context parallelism, and Transformer Engine's needs a GPU.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Which tokens of a sequence a context-parallel rank reads, in Megatron's order of chunks.

    Of 2 x ``size`` chunks those at ``rank`` and at ``rank`` from the end: causal work is level.
    """
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if size > 1 else torch.arange(length)


class ContextAttention(torch.nn.Module):
    """A core attention for Megatron's layers: gathers keys and values, and masks by position.

    Of [sequence, batch, head, number] tensors.
    """

    def __init__(self, config: Any, *_: Any, pg_collection: Any, **__: Any) -> None:
        super().__init__()
        self._scale = config.kv_channels**-0.5
        self._group = pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        size = self._group.size()
        length = len(query) * size
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(each, group=self._group)
                for each in (key, value)
            )
        here = [positions(length, rank, size) for rank in range(size)]
        future = torch.cat(here)[None, :] > here[self._group.rank()][:, None]
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self._scale
        weights = scores.masked_fill(future.to(scores.device), -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)
