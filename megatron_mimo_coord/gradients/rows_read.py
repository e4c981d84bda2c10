"""Is every rank given the rows of its own samples?

One that is given the ``input_ids`` of a whole microbatch, or of another module's larger slice, has
just as many rows as that. Other numbers of rows are the trainer's affair: most layouts never read
them.
"""

from collections.abc import Sequence
from math import isfinite

import torch

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout import LANGUAGE


class RowsRead:
    """How many rows this rank reads: a part of its report.

    Args:
        job: the modules, and which of them are here.

    Attributes:
        data_parallel_sizes: DP of every module of the job.
        place: (DP, DP rank) of the module here whose samples are read; None if they differ.
        rows: of the last ``input_ids``, if they are samples.
        agree: whether all ranks that said so read microbatches of one size.
        size: how many numbers ranks tell each other.
    """

    def __init__(self, job: Job) -> None:
        self.data_parallel_sizes = {n: grid.data_parallel_size for n, grid in job.grids.items()}
        sizes = {name: self.data_parallel_sizes[name] for name in job.ddps}
        fewest = sizes.get(LANGUAGE) or min(sizes.values())
        self._readers = (
            [LANGUAGE] if LANGUAGE in sizes else [n for n in sizes if sizes[n] == fewest]
        )
        places = {job.grids[name].coordinate(job.rank, "dp") for name in self._readers}
        self.place = (fewest, places.pop()) if len(places) == 1 else None
        self.rows: int | None = None
        self.agree = False
        self.size = 2 * len(self.data_parallel_sizes)

    def fill(self, numbers: torch.Tensor) -> None:
        """Of each module the samples of a microbatch, by the rows of one rank, and less that."""
        for pair, (name, size) in zip(
            numbers.view(-1, 2), self.data_parallel_sizes.items(), strict=True
        ):
            if self.rows is not None and name in self._readers:
                pair[0], pair[1] = self.rows * size, -self.rows * size

    def check(self, largest: Sequence[float]) -> None:
        """Refuse rows of the whole microbatch, or of larger slices than a module's."""
        most, least = largest[::2], [-each for each in largest[1::2]]
        said = dict(zip(self.data_parallel_sizes, zip(least, most, strict=True), strict=True))
        for name, samples in said.items():
            for other, (fewest, total) in said.items():
                if name != other and LANGUAGE in (name, other) and fewest == total > 0:
                    self._check(name, samples, total)
        self.agree = len({*filter(isfinite, (*least, *most))}) == 1

    def _check(self, name: str, samples: tuple[float, float], total: float) -> None:
        """Refuse those of one module.

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

    def forget(self) -> None:
        """The next forward says it anew."""
