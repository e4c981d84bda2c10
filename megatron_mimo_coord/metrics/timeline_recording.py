"""Which steps are recorded, and what comes of them: a trace, a summary and measured costs."""

import atexit
import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_count, shown
from megatron_mimo_coord.metrics.measured_costs import RankBytes, measured_costs, to_toml
from megatron_mimo_coord.metrics.step_observer import StepObserver
from megatron_mimo_coord.metrics.step_summary import Step, StepSummary, step_seconds
from megatron_mimo_coord.planning.timeline import FORWARD, Span
from megatron_mimo_coord.planning.trace import chrome_trace
from megatron_mimo_coord.world.gather import gather_text

logger = logging.getLogger(__name__)


class TimelineRecording:
    """Steps that are recorded, or were.

    At the end of the last one the ranks send rank 0 what they did, in one gather, and it writes the
    files. A recording that ends before, with the trainer or with the coordinator, writes nothing
    and logs how many of its steps it saw.

    Args:
        steps: which of the steps from now on.
        step: tells when one begins, which is where gradients are zeroed, and when it ends.
        observer: of this rank.
        has_optimizer: whether a step ends with an optimizer's; else it ends when it is finalized.
        grids: where each module lies.
        path: of the trace; ``costs.toml`` goes beside it.
        gpus_per_node: idle ones included; those that PyTorch sees if None, or else ranks.
        flops_per_sample: of the model, forward and backward, if anyone knows.

    Attributes:
        summary: where the time went, on rank 0 once the last step is over; else None.
    """

    def __init__(
        self,
        steps: range,
        step: StepState,
        observer: StepObserver,
        has_optimizer: bool,
        *,
        grids: Mapping[str, ModuleGrid],
        path: Path,
        gpus_per_node: int | None,
        flops_per_sample: float | None,
    ) -> None:
        self.summary: StepSummary | None = None
        self._steps = steps
        self._step = step
        self._observer = observer
        self._grids = grids
        self._path = path
        seen = torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._gpus_per_node = gpus_per_node or seen
        self._flops_per_sample = flops_per_sample
        self._begun = 0
        self._ends = step.on_used if has_optimizer else step.on_finalized
        step.on_begin.append(self._begin)
        self._ends.append(self._end)
        atexit.register(self.give_up)

    def give_up(self) -> None:
        """Write nothing, if the last step is not over."""
        if self._begin in self._step.on_begin:
            self._stop()
            seen = max(0, self._begun - self._steps.start)
            logger.warning(
                "record_timeline saw %s of %s steps begin, so %s is not written: a step begins "
                "with zero_grad_buffer, the coordinator's or the DDPs', and ends with the step of "
                "the optimizer that attach was given",
                seen,
                len(self._steps),
                self._path,
            )

    def _begin(self) -> None:
        if self._begun == self._steps.start:
            self._observer.start()
        if self._begun in self._steps:
            self._observer.recorder.begin_step()
        self._begun += 1

    def _end(self) -> None:
        self._observer.recorder.end_step()
        if self._begun == self._steps.stop:
            self._stop()
            ranks = [
                json.loads(text) for text in gather_text(json.dumps(self._observer.observed()))
            ]
            if ranks:
                self.summary = self._write(ranks)

    def _stop(self) -> None:
        self._step.on_begin.remove(self._begin)
        self._ends.remove(self._end)
        self._observer.stop()
        atexit.unregister(self.give_up)

    def _write(self, ranks: Sequence[Mapping[str, Any]]) -> StepSummary:
        """Write the files, by what each rank says: ``StepObserver.observed``."""
        steps: list[Step] = [
            {rank: [Span(*row) for row in of["steps"][index]] for rank, of in enumerate(ranks)}
            for index in range(len(ranks[0]["steps"]))
        ]
        language = self._grids[LANGUAGE]
        rows, sequence_length = ranks[language.ranks[0]]["input_shape"]
        micro_batch_size = rows * language.data_parallel_size
        num_microbatches = sum(
            span.kind == FORWARD and span.module == LANGUAGE for span in steps[0][language.ranks[0]]
        )
        costs = measured_costs(
            steps,
            [RankBytes(**of["bytes"]) for of in ranks],
            self._grids,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
            sequence_length=sequence_length,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.with_name("costs.toml").write_text(to_toml(costs))
        begins = accumulate((step_seconds(step) for step in steps[:-1]), initial=0.0)
        trace = chrome_trace(
            ("rank", rank, begin, spans)
            for begin, step in zip(begins, steps, strict=True)
            for rank, spans in step.items()
        )
        self._path.write_text(json.dumps(trace), encoding="utf-8")
        return StepSummary.of(
            steps,
            self._grids,
            samples=micro_batch_size * num_microbatches,
            sequence_length=sequence_length,
            gpus_per_node=self._gpus_per_node,
            flops_per_sample=self._flops_per_sample,
        )


def steps_to_record(steps: Any) -> range:
    """The steps that a user names, counted from now.

    Raises:
        ValueError: neither a number of steps nor a range of them.

    Example:
        >>> steps_to_record(3), steps_to_record(range(5, 8))
        (range(0, 3), range(5, 8))
    """
    if is_count(steps):
        return range(steps)
    if isinstance(steps, range) and len(steps) and steps.step == 1 and steps.start >= 0:
        return steps
    raise ValueError(
        f"steps must be how many of the next steps to record, or a range of them counted from now, "
        f"got {shown(steps)}; give 3, or range(10, 13) to let ten go by first"
    )
