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
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer
from torch.nn.utils import get_total_norm

from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


_guards: "WeakKeyDictionary[MimoOptimizer, FiniteSteps]" = WeakKeyDictionary()


class FiniteSteps:
    """Stands in for two methods of an optimizer, which calls them in this order in every step.

    Args:
        optimizer: whose ``prepare_grads`` and ``get_grad_norm`` are routed through this object.
        report: what else the ranks tell each other in the same collective.
    """

    def __init__(self, optimizer: MimoOptimizer, report: StepReport) -> None:
        self._report = report
        self._names = sorted(optimizer.module_infos)
        self._optimizers = {
            name: info.optimizer
            for name, info in optimizer.module_infos.items()
            if info.is_active and info.optimizer
        }
        self._norm: float | None = None
        optimizer.prepare_grads = self.prepare_grads
        optimizer.get_grad_norm = self.get_grad_norm
        self._updates = []
        for scaler in _loss_scalers(self._optimizers.values()):
            self._updates.append(scaler.update)
            scaler.update = _later

    @classmethod
    def install(cls, optimizer: Any, report: StepReport) -> None:
        """Guard an optimizer, once; one of another class stays as it is."""
        if isinstance(optimizer, MimoOptimizer):
            if optimizer not in _guards:
                _guards[optimizer] = cls(optimizer, report)
            _guards[optimizer]._report = report

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
        return [name for name, optimizer in self._optimizers.items() if optimizer.prepare_grads()]

    def _norms(self, found_inf: Iterable[str] = ()) -> torch.Tensor:
        """Norm of each module on this rank, Inf or NaN if any of its gradients is not finite."""
        norms = torch.zeros(len(self._names), dtype=torch.float64, device=world_device())
        for name, optimizer in self._optimizers.items():
            index = self._names.index(name)
            norms[index] = math.inf if name in found_inf else _norm(optimizer)
            beside = _beside_the_norm(optimizer)
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


def _norm(optimizer: Any) -> float:
    """Megatron's norm of a module's gradients, without overflow. Collective in the module."""
    norm = optimizer.get_grad_norm() or 0.0
    if not math.isinf(norm):
        return float(norm)
    square = 0.0  # of finite gradients too large to be squared in fp32, or one of them is Inf
    for inner in _inner(optimizer):
        norms = [
            torch.linalg.vector_norm(grad, dtype=torch.float64)
            for grad in inner.get_grads_for_grad_norm()
        ]
        squares = torch.tensor(0.0, dtype=torch.float64, device=world_device())
        squares = torch.stack([squares, *norms]).square().sum()
        dist.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
        square += squares.item()
    return math.sqrt(square)


def _beside_the_norm(optimizer: Any) -> list[torch.Tensor]:
    """Gradients on this rank that Megatron's norm leaves out: copies of those of other ranks."""
    beside = []
    for inner in _inner(optimizer):
        counted = {id(grad) for grad in inner.get_grads_for_grad_norm()}
        grads = [
            getattr(param, "decoupled_grad", None) if param.grad is None else param.grad
            for param in inner.get_parameters()
        ]
        beside += [grad for grad in grads if grad is not None and id(grad) not in counted]
    return beside


def _inner(optimizer: Any) -> list[Any]:
    """The optimizers of a module: one for its dense weights, another for experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _loss_scalers(optimizers: Iterable[Any]) -> list[Any]:
    """The dynamic loss scale of each optimizer, if it has one."""
    inner = [each for optimizer in optimizers for each in _inner(optimizer)]
    scalers = [getattr(optimizer, "grad_scaler", None) for optimizer in inner]
    return [scaler for scaler in scalers if scaler is not None]


def _later(found_inf: bool) -> None:
    """Instead of a scale's own ``update``, which follows once all modules are known."""
