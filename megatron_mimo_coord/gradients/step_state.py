"""What has become of a model's gradients since they were zeroed, and what a step has forgotten.

A trainer that forgets a line mostly trains on, with wrong gradients. Counters on the host tell: of
PyTorch's writes to each gradient buffer, of forward and backward passes, of calls of
``zero_grad_buffer``. Nothing is launched on the device and nothing is exchanged. A check raises on
all ranks alike because it looks at what all ranks do alike: one whose batch has no image goes to
the schedule's communicator as often as its peers.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.gradients.buckets import grad_buffers
from megatron_mimo_coord.gradients.finite_steps import FiniteSteps
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.layout import LANGUAGE

_SHARED = "_mimo_step_state"
"""Attribute of a model and of an optimizer: the state that all coordinators of the model share."""


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
        model: whose forward passes are counted.
        ddps: the modules on this rank, whose ``zero_grad_buffer`` is routed through this object,
            whoever calls it.
        report: what the ranks tell each other before an optimizer step.

    Attributes:
        optimizers: Megatron's optimizers that are watched.
        num_changes: how often one of them took a step, or a checkpoint was loaded.
    """

    def __init__(
        self, model: MimoModel, ddps: Sequence[DistributedDataParallel], report: StepReport
    ) -> None:
        self._ddps = ddps
        self._assignments = PendingAssignments.shared(model)
        self.report = report
        self.optimizers: WeakSet[MegatronOptimizer] = WeakSet()
        self.num_changes = 0
        self._configs: list[ModelParallelConfig] = []
        self._attached: list[tuple[ModelParallelConfig, Any]] = []
        self._grads = [buffer.grad_data for ddp in ddps for buffer in grad_buffers(ddp)]
        self._enter(Phase.UNTOUCHED)
        for ddp in ddps:
            ddp.zero_grad_buffer = self._reporting_zeroing(type(ddp).zero_grad_buffer, ddp)
        self._hooks = [
            model.register_forward_pre_hook(self._count_forward, with_kwargs=True),
            model.register_forward_hook(self._watch_outputs),
        ]

    @classmethod
    def shared(
        cls,
        wrapped: Any,
        model: MimoModel,
        ddps: Mapping[str, DistributedDataParallel],
        data_parallel_sizes: Mapping[str, int],
    ) -> "StepState":
        """The one of a model and its DDPs, made when it is first asked for.

        Args:
            wrapped: what the schedule runs: the model, or a chain of ``.module`` that ends in it.
            model: the model.
            ddps: the modules on this rank.
            data_parallel_sizes: DP of every module of the job.
        """
        state: StepState | None = getattr(model, _SHARED, None)
        if state is None or state._ddps != list(ddps.values()):
            if state is not None:
                for hook in state._hooks:
                    hook.remove()
            state = cls(model, list(ddps.values()), StepReport(data_parallel_sizes, list(ddps)))
            setattr(model, _SHARED, state)
        while wrapped is not model:
            state._configs.append(getattr(wrapped, "config", model.config))
            wrapped = wrapped.module
        state._configs.append(model.config)
        return state

    # -- what happens ------------------------------------------------------------------------------

    def attached(self, config: ModelParallelConfig, finalize: Callable[..., None]) -> None:
        """A config has been told to call ``finalize`` at the end of a step."""
        others = [pair for pair in self._attached if pair[0] is not config]
        self._attached = [*others, (config, finalize)]
        self._enter(self._phase)  # whatever was forgotten before is mended

    def begin(self) -> None:
        """The schedule begins a step through our hooks, and will finalize it."""
        if torch.is_grad_enabled():  # else it evaluates, and there will be nothing to finalize
            self._begun = True

    def count_backward(self, *_: Any) -> None:
        """A backward pass was seen by our communicator, on every rank alike, or at an output."""
        self._backward_passes += 1

    def finalized(self, misses_tokens: torch.Tensor | None) -> None:
        """The gradients are those of the one loss.

        Args:
            misses_tokens: whether nobody counted its tokens, None if the loss is a mean.
        """
        self.report.misses_tokens = misses_tokens
        self._enter(Phase.FINALIZED)

    def watch(self, optimizer: Any) -> None:
        """Check the gradients before each step of an optimizer, and remember that it used them."""
        FiniteSteps.install(optimizer, self.report)
        if isinstance(optimizer, MegatronOptimizer):
            self.optimizers.add(optimizer)
        is_watched = hasattr(optimizer, _SHARED)
        setattr(optimizer, _SHARED, self)
        if hasattr(optimizer, "step") and not is_watched:
            optimizer.step = MethodType(_watched(optimizer.step), optimizer)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._versions = self._current_versions()
        self._forward_passes = self._backward_passes = 0
        self._begun = False

    def _count_forward(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._forward_passes += 1
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            is_packed = kwargs.get("packing_kwargs") is not None
            # Images that are dealt out by cost: a rank encodes others than its text says.
            is_assigned = LANGUAGE not in self.report.here and any(
                map(self._assignments.next, self.report.here)
            )
            has_rows = input_ids is not None and not is_packed and not is_assigned
            self.report.rows = len(input_ids) if has_rows else None

    def _watch_outputs(self, _: Any, __: Any, returned: Any) -> None:
        """Backward passes begin at them, also on a rank whose batch has no image."""
        outputs = returned[0] if isinstance(returned, tuple) else returned
        for output in outputs.values() if isinstance(outputs, Mapping) else [outputs]:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(self.count_backward)

    def _reporting_zeroing(
        self, zero: Callable[[Any], None], ddp: DistributedDataParallel
    ) -> Callable[[], None]:
        def zero_grad_buffer() -> None:
            zero(ddp)
            self._enter(Phase.ZEROED)

        return zero_grad_buffer

    def _current_versions(self) -> list[int]:
        """PyTorch's count of the writes to each gradient buffer: backward's, zeroing, scaling."""
        return [grads._version for grads in self._grads]

    # -- what must not -----------------------------------------------------------------------------

    def is_unfinalized(self, if_begun: bool = True) -> bool:
        """Whether backward has added to the gradients since they were zeroed or finalized.

        Args:
            if_begun: what to say of a step that the schedule began through our hooks: it would have
                been finalized, had no exception cut it short.
        """
        if (self._begun and not if_begun) or self._is_left_to_others:
            return False
        if self._backward_passes:
            return True
        is_fresh = self._phase in (Phase.UNTOUCHED, Phase.ZEROED)
        return is_fresh and bool(self._forward_passes) and self._was_written

    @property
    def _was_written(self) -> bool:
        return self._versions != self._current_versions()

    @property
    def _is_left_to_others(self) -> bool:
        """Whether the schedule calls another's function to finalize gradients."""
        ours = [finalize for _, finalize in self._attached]
        hooks = [config.finalize_model_grads_func for config in self._configs]
        return any(hook is not None and hook not in ours for hook in hooks)

    def check_finalized(self, if_begun: bool = True) -> None:
        """Refuse to go on with gradients that nobody has finalized.

        Args:
            if_begun: as in :meth:`is_unfinalized`.
        """
        if not self.is_unfinalized(if_begun):
            return
        attached = [config for config, _ in self._attached]
        if not attached:
            advice = (
                "call coordinator.attach(get_model_config(model), optimizer) before the first step"
            )
        elif not any(config is each for config in self._configs for each in attached):
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


def _watched(step: Callable[..., Any]) -> Callable[..., Any]:
    def checked_step(optimizer: Any, *args: Any, **options: Any) -> Any:
        state: StepState = getattr(optimizer, _SHARED)
        state.check_finalized()
        state.num_changes += 1
        outcome = step(*args, **options)
        state._enter(Phase.USED if state._phase is Phase.FINALIZED else state._phase)
        return outcome

    return checked_step
