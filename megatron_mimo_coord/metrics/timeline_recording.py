"""Which steps are recorded, and when they are written."""

import atexit
import json
import logging
import os
from typing import Any

import torch

from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.layout import is_count, shown
from megatron_mimo_coord.metrics.step_observer import StepObserver
from megatron_mimo_coord.metrics.step_summary import StepSummary
from megatron_mimo_coord.metrics.timeline_report import TimelineReport
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
        report: what rank 0 makes of it.
        has_optimizer: whether a step ends with an optimizer's; else it ends when it is finalized.

    Attributes:
        summary: where the time went, on rank 0 once the last step is over; else None.
    """

    def __init__(
        self,
        steps: range,
        step: StepState,
        observer: StepObserver,
        report: TimelineReport,
        has_optimizer: bool,
    ) -> None:
        self.summary: StepSummary | None = None
        self._steps = steps
        self._step = step
        self._observer = observer
        self._report = report
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
                self._report.path,
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
                self.summary = self._report.write(ranks)

    def _stop(self) -> None:
        self._step.on_begin.remove(self._begin)
        self._ends.remove(self._end)
        self._observer.stop()
        atexit.unregister(self.give_up)


def gpus_of_a_node() -> int:
    """GPUs of this rank's node, idle ones included; ranks of the node where there are none."""
    return torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
