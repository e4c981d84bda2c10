"""Do all ranks read the same samples? Digests of texts, made on the device, read with the norms.

Ranks whose loaders shuffle by themselves train on images and texts, or on texts and labels, of
different samples. Each rank says with its norms what it read in a step, in numbers for each part of
a microbatch that no module divides; only where these differ do ranks tell each other all of them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import lcm
from typing import Any

import torch
from attrs import frozen

from megatron_mimo_coord.gradients.rows_read import RowsRead
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text

_MODULUS = 1 << 40  # so that a number is whole in fp64
_KINDS = ("input_ids", "labels")


@frozen
class _Read:
    """What one microbatch's samples of this rank are: of each kind a digest of each sample."""

    digests: Mapping[str, torch.Tensor]
    length: int


class TextsRead:
    """What this rank reads in a step: a part of its report.

    Args:
        rows: say whose samples those are.

    Attributes:
        size: how many numbers ranks tell each other.
    """

    def __init__(self, rows: RowsRead) -> None:
        self._rows = rows
        # Of a microbatch: each module's slice is a number of whole ones.
        self._parts = lcm(*rows.data_parallel_sizes.values())
        self.size = 3 * 2 * self._parts
        self._step: list[_Read] = []
        self._last: list[_Read] = []

    def add(self, given: Mapping[str, Any]) -> None:
        """A microbatch: its ``input_ids`` and ``labels``, [sample, token] each, if it has them."""
        texts = {
            kind: text
            for kind in _KINDS
            if torch.is_tensor(text := given.get(kind))
            and text.ndim == 2
            and not text.is_floating_point()
        }
        length = max((text.shape[1] for text in texts.values()), default=0)
        self._step.append(_Read({kind: _digests(text) for kind, text in texts.items()}, length))

    @contextmanager
    def later(self) -> Iterator[list[_Read]]:
        """Inside, microbatches of a later step are read; yields what :meth:`put_back` is to get."""
        step, self._step = self._step, []
        try:
            yield self._step
        finally:
            self._step = step

    def put_back(self, read: list[_Read]) -> None:
        """Those microbatches are of this step."""
        self._step += read

    def forget(self) -> None:
        """Another step begins."""
        self._step = []

    def fill(self, numbers: torch.Tensor) -> None:
        """Say for each part of a microbatch what its texts are, its labels, and how long."""
        self._last, self._step = self._step, []
        if self._rows.place is None:
            return
        numbers = numbers.view(3, 2, self._parts)
        size, index = self._rows.place
        share = self._parts // size
        mine = slice(index * share, (index + 1) * share)
        for row, kind in enumerate(_KINDS):
            digests = [read.digests.get(kind) for read in self._last]
            parts = [_of_parts(each, share) for each in digests if each is not None]
            if parts and len(parts) == len(digests):
                _fill(numbers[row, :, mine], _combined(parts))
        if self._last:
            _fill(numbers[2, :, mine], _combined([read.length for read in self._last]))

    def check(self, largest: Sequence[float]) -> None:
        """Refuse a step whose ranks read different samples. Collective if they did.

        Raises:
            RuntimeError: names two ranks, the microbatch and the first sample.
        """
        if not self._rows.agree:
            return
        most, least = torch.tensor(largest, dtype=torch.float64).view(3, 2, -1).unbind(1)
        differs = (most != -least) & most.isfinite()
        if not (differs[:2] & ~differs[2]).any():
            return  # texts of different lengths are padded as each rank likes
        digests = {
            kind: [
                read.digests[kind].tolist() if kind in read.digests else [] for read in self._last
            ]
            for kind in _KINDS
        }
        everyone = [
            json.loads(text)
            for text in all_gather_text(
                json.dumps([self._rows.place, digests]), device=world_device()
            )
        ]
        raise RuntimeError(_sentence(everyone))


def _digests(text: torch.Tensor) -> torch.Tensor:
    """A number for each row, in which each token and its place count; sums wrap around."""
    places = torch.arange(1, text.shape[1] + 1, device=text.device) * 0x9E3779B97F4A7C1
    mixed = (text.long() + 1) * places
    return (mixed ^ (mixed >> 31)).sum(1) % _MODULUS


def _of_parts(digests: torch.Tensor, share: int) -> torch.Tensor:
    """One number for each of so many equal parts of some samples."""
    if len(digests) % share:
        return digests.new_zeros(share)
    samples = digests.view(share, -1)
    places = torch.arange(1, samples.shape[1] + 1, device=digests.device)
    return (samples * places).sum(1) % _MODULUS


def _combined[N: (int, torch.Tensor)](microbatches: list[N]) -> N:
    """One number for all microbatches of a step."""
    total, *others = (each % _MODULUS for each in microbatches)
    for each in others:
        total = (total * 1_000_003 + each) % _MODULUS
    return total


def _fill(numbers: torch.Tensor, values: torch.Tensor | int) -> None:
    numbers[0] = values
    numbers[1] = -numbers[0]


def _sentence(everyone: list[Any]) -> str:
    """What is wrong, by (place, digests of each microbatch) of every rank."""
    seen: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, (place, digests) in enumerate(everyone):
        for kind in _KINDS if place else ():
            for microbatch, samples in enumerate(digests[kind]):
                for sample, digest in enumerate(samples, place[1] * len(samples)):
                    other, theirs = seen.setdefault((kind, microbatch, sample), (rank, digest))
                    if theirs != digest:
                        return (
                            f"microbatch {microbatch}: ranks {other} and {rank} were given "
                            f"different samples, the first that differs is sample {sample} of "
                            f"{len(samples) * place[0]} (in its {kind}): read the same samples in "
                            f"the same order on both, with one seed for every rank's sampler"
                        )
    return "ranks were given different samples: read the same in the same order on all of them"
