"""The optimizers that use a model's gradients: what is looked at before each step of theirs.

Megatron's ``MimoOptimizer`` looks for NaN and Inf only when it scales an fp16 loss, and tells the
ranks of one module's gradient norm to those of the others by a maximum, which loses a NaN: they
would clip and step by different norms. Here the same norms, from the same pass over the gradients
and the same collective, are known before the step is decided: each module's optimizer prepares its
gradients; what is not finite is detected; all ranks hear of it; one decision follows.

With fp16 each module has a loss scale of its own, which it would lower by itself. The loss has only
one: here they all change together, or the gradients of the modules would drift apart.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import MegatronOptimizer
from torch.nn.utils import get_total_norm

from megatron_mimo_coord.checks.replicas import differing_gradients
from megatron_mimo_coord.gradients.misfits import Misfit
from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.optimizers import (
    ModuleOptimizer,
    module_names,
    optimizers_here,
    route_decision,
    route_step,
)
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)

LOOKED_AT = 4
"""Steps in which copies of weights are compared: where an adapter begins at zero, not the first."""


class OptimizerSteps:
    """Checks gradients before an optimizer uses them, and remembers that it did.

    Args:
        modules: those on this rank.
        step: where a step stands.
        report: what the ranks tell each other before an optimizer's step.
        changes: the coordinator's.

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
            decision = _Decision(optimizer, self._report, self._changes)
            route_decision(optimizer, decision.skips, decision.grad_norm, self._changes)
            for module in self._modules:
                module.ddp.leave_nan_to_the_optimizer(self._changes)
        route_step(optimizer, self._before, self._step.used, self._changes)

    def _before(self) -> None:
        self._step.check_finalized()
        for module in self._modules if self.num_changes < LOOKED_AT else ():
            weights = differing_gradients(module.ddp.ddp, module.pg_collection.tp)
            if weights:
                self._report.misfits.add(_moved_apart(module.name, weights))
        self.num_changes += 1


def _moved_apart(module: str, weights: Sequence[str]) -> Misfit:
    return Misfit(
        (-1, 2),
        f"the tensor-parallel ranks of {module} have other gradients of the same weights "
        f"({listed(weights)}), and would move them apart: have each get the sum, by "
        f"parameter.sequence_parallel = True where a weight is applied to parts of a sequence, and "
        f"by copy_to_tensor_model_parallel_region(output, group=pg_collection.tp) where its output "
        f"feeds shards, as that of an adapter's first layer does; what is a shard itself is to be "
        f"one of Megatron's layers, or parameter.tensor_model_parallel = True",
    )


class _Decision:
    """Whether all ranks skip a step, and the norm by which they clip."""

    def __init__(self, optimizer: MimoOptimizer, report: StepReport, changes: Changes) -> None:
        self._report = report
        self._names = module_names(optimizer)
        self._optimizers = {
            name: ModuleOptimizer(each) for name, each in optimizers_here(optimizer).items()
        }
        self._largest_norm = optimizer.config.grad_norm_skip_threshold
        self._norm: float | None = None
        self._update_loss_scales = [
            update
            for each in self._optimizers.values()
            for update in each.defer_loss_scale(changes)
        ]

    @torch.no_grad()
    def skips(self) -> bool:
        """Whether to skip the step. Collective over the world.

        Raises:
            RuntimeError: the report of the ranks says why these gradients are wrong.
        """
        found_inf = [name for name, each in self._optimizers.items() if each.prepare()]
        norms, reported = self._agree(self._norms(found_inf), self._report.pack())
        self._report.check(reported)
        pairs = zip(self._names, norms, strict=True)
        not_finite = [name for name, norm in pairs if math.isinf(norm)]
        norm = math.hypot(*norms)
        why = ""
        if not_finite:
            modules = " and ".join(f"module {name!r}" for name in not_finite)
            why = (
                f"the gradients of {modules} are not finite; look at its inputs, its loss and the "
                f"learning rate of the steps before"
            )
        elif norm > self._largest_norm:
            limit = f"grad_norm_skip_threshold={self._largest_norm:g}"
            why = f"the norm of the gradients is {norm:.4g}, above {limit}"
        if why and dist.get_rank() == 0:
            logger.warning("optimizer step skipped on all ranks: %s", why)
        for update in self._update_loss_scales:
            update(bool(not_finite))
        self._norm = None if why else norm
        return bool(why)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Norm of all modules' gradients together; collective unless a step is under way."""
        norm, self._norm = self._norm, None
        if norm is None:
            norms, _ = self._agree(self._norms(), torch.zeros(0, device=world_device()))
            norm = math.hypot(*norms)
        return norm

    def _norms(self, found_inf: Iterable[str] = ()) -> torch.Tensor:
        """Norm of each module on this rank, Inf or NaN if any of its gradients is not finite."""
        norms = torch.zeros(len(self._names), dtype=torch.float64, device=world_device())
        for name, optimizer in self._optimizers.items():
            index = self._names.index(name)
            norms[index] = math.inf if name in found_inf else optimizer.norm()
            beside = optimizer.beside_the_norm()
            if beside:
                # By the largest: a sum of squares can be too large for the dtype of the gradients.
                is_finite = get_total_norm(beside, math.inf).isfinite()
                norms[index] = torch.where(is_finite, norms[index], math.inf)
        return norms

    def _agree(
        self, norms: torch.Tensor, reported: torch.Tensor
    ) -> tuple[list[float], list[float]]:
        """The largest of all ranks. Ranks of one module have one norm; a maximum loses a NaN."""
        numbers = torch.cat((norms.nan_to_num(nan=math.inf, posinf=math.inf), reported.double()))
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        values = numbers.tolist()
        return values[: len(norms)], values[len(norms) :]
