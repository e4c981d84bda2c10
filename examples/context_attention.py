"""Causal attention over sequences that context-parallel ranks share, for ranks without a GPU.

Megatron's own for the CPU refuses context parallelism, and Transformer Engine's needs a GPU.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def positions(length: int, rank: int = 0, size: int = 1) -> torch.Tensor:
    """Which tokens of a sequence a context-parallel rank reads, in Megatron's order of chunks.

    Of 2 x ``size`` chunks those at ``rank`` and at ``rank`` from the end: causal work is level.
    """
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if size > 1 else torch.arange(length)


def packed_positions(bounds: Sequence[int], rank: int = 0, size: int = 1) -> torch.Tensor:
    """The same of sequences that lie one behind the other, between these bounds."""
    pairs = itertools.pairwise(bounds)
    return torch.cat([start + positions(end - start, rank, size) for start, end in pairs])


class ContextAttention(torch.nn.Module):
    """A core attention for Megatron's layers: gathers keys and values, and masks by position.

    Of [sequence, batch, head, number] tensors, or of packed sequences [token, head, number].
    """

    def __init__(self, config: Any, *_: Any, pg_collection: Any, **__: Any) -> None:
        super().__init__()
        self._scale = config.kv_channels**-0.5
        self._group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> torch.Tensor:
        size = self._group.size()
        bounds = [0, len(query) * size]
        if packed_seq_params is not None:
            query, key, value = (each.unsqueeze(1) for each in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q.tolist()
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(each, group=self._group)
                for each in (key, value)
            )
        here = [packed_positions(bounds, rank, size) for rank in range(size)]
        queries, keys = here[self._group.rank()][:, None], torch.cat(here)[None, :]
        starts = torch.tensor(bounds[1:])
        others = torch.bucketize(queries, starts, right=True) != torch.bucketize(
            keys, starts, right=True
        )
        hidden = (others | (keys > queries)).to(query.device)
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self._scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)
