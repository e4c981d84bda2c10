"""Where the time of measured steps went, in numbers: by module, and over the job."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from statistics import mean, median

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.description import aligned
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    COMPUTING,
    DATA,
    FORWARD,
    Span,
    StageShares,
)

Step = Mapping[int, Sequence[Span]]
"""For each rank, what it did in a step."""


@frozen(kw_only=True)
class StepSummary:
    """Where the time of recorded steps went; ``print`` it as a table.

    Args:
        seconds: how long a step took, the median of those recorded.
        modules: what part of a step the ranks of each module spent on what, on average.
        data: part of a step in which the ranks of each module, idle, read their batch.
        imbalance: for each encoder with several data-parallel ranks, largest work of one divided by
            the mean.
        samples_per_second: over all ranks.
        tokens_per_second: text and modality tokens of the language model's sequences, over all
            ranks.
        used_gpus: ranks of the job.
        allocated_gpus: GPUs of the nodes that the job takes, idle ones included.
        flops_per_second: of the model over all ranks; None if nobody said how many a sample takes.
    """

    seconds: float
    modules: Mapping[str, StageShares]
    data: Mapping[str, float]
    imbalance: Mapping[str, float]
    samples_per_second: float
    tokens_per_second: float
    used_gpus: int
    allocated_gpus: int
    flops_per_second: float | None = None

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        grids: Mapping[str, ModuleGrid],
        *,
        samples: int,
        sequence_length: int,
        gpus_per_node: int,
        flops_per_sample: float | None = None,
    ) -> "StepSummary":
        """Sum up steps, of so many samples over all ranks, of as many tokens as the model sees."""
        seconds = median(step_seconds(step) for step in steps)
        ranks = len(steps[0])
        return cls(
            seconds=seconds,
            modules={name: _shares(steps, grid) for name, grid in grids.items()},
            data={
                name: _share(steps, grid, lambda span: span.kind == DATA)
                for name, grid in grids.items()
            },
            imbalance={
                name: data_parallel_imbalance(steps, grid)
                for name, grid in grids.items()
                if name != LANGUAGE and grid.data_parallel_size > 1
            },
            samples_per_second=samples / seconds,
            tokens_per_second=samples * sequence_length / seconds,
            used_gpus=ranks,
            allocated_gpus=ceil(ranks / gpus_per_node) * gpus_per_node,
            flops_per_second=flops_per_sample and flops_per_sample * samples / seconds,
        )

    def __str__(self) -> str:
        rows = [("module", "busy", "waiting on a bridge", "data", "idle else", "imbalance")]
        for name, shares in self.modules.items():
            imbalance, data = self.imbalance.get(name), self.data[name]
            rows.append(
                (
                    name,
                    f"{shares.busy:.0%}",
                    f"{shares.waiting:.0%}",
                    f"{data:.0%}",
                    f"{shares.idle - data:.0%}",
                    f"{imbalance:.2f}" if imbalance else "",
                )
            )
        rates = [("samples/s", self.samples_per_second), ("tokens/s", self.tokens_per_second)]
        if self.flops_per_second is not None:
            rates.append(("model TFLOP/s", self.flops_per_second / 1e12))
        lines = [f"{self.seconds:.4g} s a step", aligned(rows)]
        lines += [
            f"{rate:.4g} {name}: {rate / self.used_gpus:.4g} a GPU in use ({self.used_gpus}), "
            f"{rate / self.allocated_gpus:.4g} a GPU allocated ({self.allocated_gpus})"
            for name, rate in rates
        ]
        return "\n".join(lines)


def step_seconds(step: Step) -> float:
    """From the beginning of a step to the last span of any rank."""
    return max(span.end for spans in step.values() for span in spans)


def _shares(steps: Sequence[Step], grid: ModuleGrid) -> StageShares:
    busy = _share(steps, grid, lambda span: span.kind in COMPUTING)
    waiting = _share(steps, grid, lambda span: bool(span.bridge))
    return StageShares(busy, waiting, 1 - busy - waiting)


def _share(steps: Sequence[Step], grid: ModuleGrid, counts: Callable[[Span], bool]) -> float:
    """What part of a step the ranks of a module spend in those of its spans that count."""
    return mean(
        _sum(span for span in step[rank] if span.module == grid.name and counts(span)) / seconds
        for step, seconds in zip(steps, map(step_seconds, steps), strict=True)
        for rank in grid.ranks
    )


def data_parallel_imbalance(steps: Sequence[Step], grid: ModuleGrid) -> float:
    """Largest work of a data-parallel rank of a module, divided by the mean."""
    work = [0.0] * grid.data_parallel_size
    for step in steps:
        for rank in grid.ranks:
            work[grid.coordinate(rank, "dp")] += _sum(
                span
                for span in step[rank]
                if span.module == grid.name and span.kind in (FORWARD, BACKWARD)
            )
    return max(work) / mean(work) if any(work) else 1.0


def _sum(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)
