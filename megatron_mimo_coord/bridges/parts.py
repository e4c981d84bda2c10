"""A tensor that travels in parts: where each part is in the whole, cutting and joining."""

from collections.abc import Callable, Sequence

import torch
from attrs import frozen

from megatron_mimo_coord.bridges.routes import Run


@frozen
class Part:
    """What one data-parallel rank on the other side sends or receives of a tensor.

    Args:
        peer: that rank.
        runs: which part, as (first row, number of rows) of each run of neighboring rows.
    """

    peer: int
    runs: tuple[Run, ...]

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """These rows of the whole, contiguous; a view if they are already."""
        pieces = [tensor.narrow(dim, start, count) for start, count in self.runs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)).contiguous()


@frozen
class Whole:
    """A tensor that is sent or received in parts.

    Args:
        shape: of the whole.
        dim: along which it is cut.
        dtype: in which it travels.
        parts: which cover it, in any order; a part without elements does not travel.
    """

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    parts: tuple[Part, ...]

    def buffers(self) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
        """Where to receive each part, and what makes the whole of them once they are there."""
        if self.dim == 0 and all(len(part.runs) == 1 for part in self.parts):
            whole = self._empty(self.shape[0])
            return [whole.narrow(0, *part.runs[0]) for part in self.parts], lambda: whole
        received = [self._empty(sum(count for _, count in part.runs)) for part in self.parts]
        return received, lambda: self._join(received)

    def _empty(self, rows: int) -> torch.Tensor:
        shape = (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])
        return torch.empty(shape, dtype=self.dtype, device=torch.cuda.current_device())

    def _join(self, received: Sequence[torch.Tensor]) -> torch.Tensor:
        """All runs in their order: one kernel, and no index that must get to the device."""
        pieces: list[tuple[int, torch.Tensor]] = []
        for part, message in zip(self.parts, received, strict=True):
            starts, counts = zip(*part.runs, strict=True)
            pieces += zip(starts, message.split(counts, self.dim), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], self.dim)
