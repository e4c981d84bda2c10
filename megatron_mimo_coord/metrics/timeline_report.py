"""What comes of recorded steps: a trace, a summary and measured costs, on rank 0."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.metrics.measured_costs import RankBytes, measured_costs, to_toml
from megatron_mimo_coord.metrics.step_summary import Step, StepSummary, step_seconds
from megatron_mimo_coord.planning.timeline import FORWARD, Span
from megatron_mimo_coord.planning.trace import chrome_trace


@frozen
class TimelineReport:
    """Where the files go, and what the ranks' clocks do not tell.

    Args:
        grids: where each module lies.
        path: of the trace; ``costs.toml`` goes beside it.
        gpus_per_node: idle ones included.
        flops_per_sample: of the model, forward and backward, if anyone knows.
    """

    grids: Mapping[str, ModuleGrid]
    path: Path
    gpus_per_node: int
    flops_per_sample: float | None

    def write(self, ranks: Sequence[Mapping[str, Any]]) -> StepSummary:
        """Write the files.

        Args:
            ranks: what each rank has to say, as ``StepObserver.observed`` returns it.
        """
        steps: list[Step] = [
            {rank: [Span(*row) for row in of["steps"][index]] for rank, of in enumerate(ranks)}
            for index in range(len(ranks[0]["steps"]))
        ]
        language = self.grids[LANGUAGE]
        rows, sequence_length = ranks[language.ranks[0]]["input_shape"]
        micro_batch_size = rows * language.data_parallel_size
        num_microbatches = sum(
            span.kind == FORWARD and span.module == LANGUAGE for span in steps[0][language.ranks[0]]
        )
        costs = measured_costs(
            steps,
            [RankBytes(**of["bytes"]) for of in ranks],
            self.grids,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
            sequence_length=sequence_length,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name("costs.toml").write_text(to_toml(costs))
        begins = accumulate((step_seconds(step) for step in steps[:-1]), initial=0.0)
        trace = chrome_trace(
            ("rank", rank, begin, spans)
            for begin, step in zip(begins, steps, strict=True)
            for rank, spans in step.items()
        )
        self.path.write_text(json.dumps(trace), encoding="utf-8")
        return StepSummary.of(
            steps,
            self.grids,
            samples=micro_batch_size * num_microbatches,
            sequence_length=sequence_length,
            gpus_per_node=self.gpus_per_node,
            flops_per_sample=self.flops_per_sample,
        )
