"""Skips an optimizer step, on all ranks alike, if a module's gradients are not finite.

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
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer
from torch.nn.utils import get_total_norm

from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.optimizers import (
    ModuleOptimizer,
    module_names,
    optimizers_here,
    route_decision,
)
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


class FiniteSteps:
    """Decides for an optimizer whether it skips a step, and by which norm it clips.

    Args:
        optimizer: which asks :meth:`prepare_grads` and :meth:`get_grad_norm` from now on.
        report: what else the ranks tell each other in the same collective.
        changes: where that is recorded.
    """

    def __init__(self, optimizer: MimoOptimizer, report: StepReport, changes: Changes) -> None:
        self._report = report
        self._names = module_names(optimizer)
        self._optimizers = {
            name: ModuleOptimizer(each) for name, each in optimizers_here(optimizer).items()
        }
        self._norm: float | None = None
        self._updates = [
            update
            for each in self._optimizers.values()
            for update in each.defer_loss_scale(changes)
        ]
        route_decision(optimizer, self.prepare_grads, self.get_grad_norm, changes)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Whether to skip the step. Collective over the world.

        Raises:
            RuntimeError: the report of the ranks says why these gradients are wrong.
        """
        found_inf = self._prepare()
        norms, reported = self._agree(self._norms(found_inf), self._report.pack())
        self._report.check(reported)
        return self._decide(norms)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Norm of all modules' gradients together; collective unless a step is under way."""
        norm, self._norm = self._norm, None
        if norm is None:
            norms, _ = self._agree(self._norms(), torch.zeros(0, device=world_device()))
            norm = math.hypot(*norms)
        return norm

    # -- prepare, detect, agree, decide ------------------------------------------------------------

    def _prepare(self) -> list[str]:
        """Have each module's optimizer get its gradients ready; the modules where it found Inf."""
        return [name for name, optimizer in self._optimizers.items() if optimizer.prepare()]

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

    def _decide(self, norms: list[float]) -> bool:
        """Whether to skip the step; the first rank says why, and all loss scales hear of it."""
        pairs = zip(self._names, norms, strict=True)
        not_finite = [name for name, norm in pairs if math.isinf(norm)]
        if not_finite and dist.get_rank() == 0:
            logger.warning(
                "optimizer step skipped on all ranks: the gradients of %s are not finite; look at "
                "its inputs, its loss and the learning rate of the steps before",
                " and ".join(f"module {name!r}" for name in not_finite),
            )
        for update in self._updates:
            update(bool(not_finite))
        self._norm = None if not_finite else math.hypot(*norms)
        return bool(not_finite)
