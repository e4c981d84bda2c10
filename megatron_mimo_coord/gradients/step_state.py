"""What has become of a model's gradients since they were zeroed, and what a step has forgotten.

A trainer that forgets a line mostly trains on, with wrong gradients. Counters on the host tell: of
PyTorch's writes to each gradient buffer, of forward and backward passes, of calls of
``zero_grad_buffer``. Nothing is launched on the device and nothing is exchanged. A check raises on
all ranks alike because it looks at what all ranks do alike: one whose batch has no image goes to
the schedule's communicator as often as its peers.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

import torch

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.megatron.forwards import Given
from megatron_mimo_coord.megatron.schedule import Schedule


class Phase(Enum):
    """What the gradient buffers hold, but for what backward has added since."""

    UNTOUCHED = auto()
    ZEROED = auto()
    FINALIZED = auto()
    USED = auto()
    """An optimizer has clipped and used them."""


class StepState:
    """Where a step stands on this rank.

    Args:
        job: whose model's passes are counted.
        grads: the gradient buffers of the modules on this rank.
        schedule: which says whether it finalizes gradients through us.

    Attributes:
        on_begin: what is called when a step begins: gradients are zeroed that were not just before.
        on_finalized: what is called when the gradients are those of the one loss.
        on_used: what is called when an optimizer has taken its step.
    """

    def __init__(self, job: Job, grads: Sequence[torch.Tensor], schedule: Schedule) -> None:
        self.on_begin: list[Callable[[], None]] = []
        self.on_finalized: list[Callable[[], None]] = []
        self.on_used: list[Callable[[], None]] = []
        self._schedule = schedule
        self._grads = grads
        self._enter(Phase.UNTOUCHED)
        job.forwards.watch(self._count_forward)
        job.changes.on_close(job.model.register_forward_hook(self._watch_outputs).remove)

    # -- what happens ------------------------------------------------------------------------------

    def _count_forward(self, _: Given) -> None:
        self._forward_passes += torch.is_grad_enabled()

    def _watch_outputs(self, _: Any, __: Any, returned: Any) -> None:
        """Count the backward passes that begin at what the model returns."""
        outputs = returned[0] if isinstance(returned, tuple) else returned
        for output in outputs.values() if isinstance(outputs, Mapping) else [outputs]:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(self.count_backward)

    def attached(self) -> None:
        """A config was told to call us at the end of a step: what was forgotten is mended."""
        self._enter(self._phase)

    def zeroed(self) -> None:
        """The gradients of a module were set to zero."""
        begins = self._phase is not Phase.ZEROED or self._backward_passes or self._begun
        self._enter(Phase.ZEROED)
        if begins:
            _call(self.on_begin)

    def begin(self) -> None:
        """The schedule begins a step through our hooks, and will finalize it."""
        if torch.is_grad_enabled():  # else it evaluates, and there will be nothing to finalize
            self._begun = True

    def not_finalized(self) -> None:
        """The schedule ended without finalizing what it began."""
        self._begun = False

    def count_backward(self, *_: Any) -> None:
        """A backward pass was seen by our communicator, on every rank alike, or at an output."""
        self._backward_passes += 1

    def finalized(self) -> None:
        """The gradients are those of the one loss."""
        self._enter(Phase.FINALIZED)
        _call(self.on_finalized)

    def used(self) -> None:
        """An optimizer has taken its step."""
        self._enter(Phase.USED if self._phase is Phase.FINALIZED else self._phase)
        _call(self.on_used)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._versions = [grads._version for grads in self._grads]
        self._forward_passes = self._backward_passes = 0
        self._begun = False

    # -- what must not -----------------------------------------------------------------------------

    @property
    def _was_written(self) -> bool:
        """By PyTorch's count of the writes to each buffer: backward's, zeroing, scaling."""
        return self._versions != [grads._version for grads in self._grads]

    def check_finalized(self, if_begun: bool = True) -> None:
        """Refuse to go on with gradients that nobody has finalized.

        Args:
            if_begun: what to say of a step that the schedule began through our hooks: it would have
                been finalized, had no exception cut it short.
        """
        if (self._begun and not if_begun) or self._schedule.calls_another:
            return
        is_fresh = self._phase in (Phase.UNTOUCHED, Phase.ZEROED)
        came = self._backward_passes or (is_fresh and self._forward_passes and self._was_written)
        if not came:
            return
        if not self._schedule.is_attached:
            advice = (
                "call coordinator.attach(get_model_config(model), optimizer) before the first step"
            )
        elif not self._schedule.reads_what_is_attached:
            advice = (
                "attach was given a config that the schedule does not read: give it "
                "get_model_config(model) itself, and no copy of it"
            )
        else:
            advice = (
                "leave config.finalize_model_grads_func as attach has set it, or call "
                "coordinator.finalize_model_grads() after the last backward"
            )
        raise RuntimeError(
            f"gradients were accumulated, but finalize_model_grads did not run: they are neither "
            f"reduced over the replicas nor those of the one loss; {advice}"
        )

    def check_finalize(self) -> None:
        """Refuse to reduce gradients twice, or those of two steps together."""
        came = self._backward_passes or self._begun or self._was_written
        if self._phase is not Phase.ZEROED and not came:
            raise RuntimeError(
                "finalize_model_grads was called outside a step, or a second time in one step, "
                "which would reduce the gradients twice: call it once after the last backward, "
                "and zero_grad_buffer() before the next step (the schedule calls it; do not "
                "call it yourself as well)"
            )
        if self._phase in (Phase.FINALIZED, Phase.USED) and (
            self._backward_passes or (self._forward_passes and self._was_written)
        ):
            raise RuntimeError(
                "backward has added to gradients that the step before has finalized, because "
                "zero_grad_buffer() was not called: call coordinator.zero_grad_buffer() before the "
                "schedule in every step (optimizer.zero_grad() leaves DDP's buffers as they are)"
            )

    def check_norms(self) -> None:
        """Refuse to measure gradients that nobody has finalized, or that an optimizer clipped."""
        self.check_finalized()
        if self._phase is Phase.USED or (self._phase is Phase.FINALIZED and self._was_written):
            raise RuntimeError(
                "grad_norms() was called after optimizer.step(), which has clipped the gradients: "
                "call it between the schedule and optimizer.step()"
            )


def _call(functions: Sequence[Callable[[], None]]) -> None:
    for function in tuple(functions):  # one that is called may take itself off the list
        function()
