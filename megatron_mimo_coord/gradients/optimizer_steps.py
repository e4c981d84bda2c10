"""The optimizers that use a model's gradients: what is looked at before each step of theirs."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import MegatronOptimizer

from megatron_mimo_coord.checks.copies import differing_gradients
from megatron_mimo_coord.gradients.finite_steps import FiniteSteps
from megatron_mimo_coord.gradients.misfits import parts_of_gradients
from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.optimizers import route_step

LOOKED_AT = 4
"""Steps in which copies of weights are compared: where an adapter begins at zero, not the first."""


class OptimizerSteps:
    """Checks gradients before an optimizer uses them, and remembers that it did.

    Args:
        modules: those on this rank.
        step: where a step stands.
        report: what the ranks tell each other before an optimizer's step.
        changes: where is recorded what is changed in optimizers.

    Attributes:
        optimizers: Megatron's optimizers that are watched.
        num_changes: how often one of them took a step, or a checkpoint was loaded.
    """

    def __init__(
        self,
        modules: Sequence[ModuleGradients],
        step: StepState,
        report: StepReport,
        changes: Changes,
    ) -> None:
        self._modules = modules
        self._step = step
        self._report = report
        self._changes = changes
        self._watched: list[Any] = []
        self.optimizers: WeakSet[MegatronOptimizer] = WeakSet()
        self.num_changes = 0

    def watch(self, optimizer: Any) -> None:
        """Look at an optimizer's steps from now on."""
        if any(each is optimizer for each in self._watched):
            return
        self._watched.append(optimizer)
        self._changes.take(optimizer)
        if isinstance(optimizer, MegatronOptimizer):
            self.optimizers.add(optimizer)
        if isinstance(optimizer, MimoOptimizer):
            FiniteSteps(optimizer, self._report, self._changes)
            for module in self._modules:
                module.ddp.leave_nan_to_the_optimizer(self._changes)
        route_step(optimizer, self._before, self._step.used, self._changes)

    def _before(self) -> None:
        self._step.check_finalized()
        for module in self._modules if self.num_changes < LOOKED_AT else ():
            weights = differing_gradients(module.ddp.ddp, module.pg_collection.tp)
            if weights:
                self._report.add(parts_of_gradients(module.name, weights))
        self.num_changes += 1
