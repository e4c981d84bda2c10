"""Skips an optimizer step, on all ranks alike, if a module's gradients are not finite.

Megatron's ``MimoOptimizer`` looks for NaN and Inf only when it scales an fp16 loss, and tells the
ranks of one module's gradient norm to those of the others by a maximum, which loses a NaN: they
would clip and step by different norms. Here the same norms, from the same pass over the gradients
and the same collective, are known before the step is decided.

With fp16 each module has a loss scale of its own, which it would lower by itself. The loss has only
one: here they all change together, or the gradients of the modules would drift apart.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer

from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


class FiniteSteps:
    """Stands in for two methods of an optimizer, which calls them in this order in every step.

    Args:
        optimizer: whose ``prepare_grads`` and ``get_grad_norm`` are routed through this object.
        report: what else the ranks tell each other in the same collective.
    """

    def __init__(self, optimizer: MimoOptimizer, report: StepReport) -> None:
        self._report = report
        self._module_infos = dict(sorted(optimizer.module_infos.items()))
        self._norm: float | None = None
        optimizer.prepare_grads = self.prepare_grads
        optimizer.get_grad_norm = self.get_grad_norm
        self._updates = []
        for scaler in _loss_scalers(self._module_infos.values()):
            self._updates.append(scaler.update)
            scaler.update = _later

    @classmethod
    def of(cls, optimizer: Any, report: StepReport) -> None:
        """Guard an optimizer, once; one of another class stays as it is."""
        if not isinstance(optimizer, MimoOptimizer):
            return
        if not hasattr(optimizer, "_mimo_finite_steps"):
            optimizer._mimo_finite_steps = cls(optimizer, report)
        optimizer._mimo_finite_steps._report = report

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Whether to skip the step. Collective over the world.

        Raises:
            RuntimeError: the report of the ranks says why these gradients are wrong.
        """
        squares = self._squares(prepare=True)
        faulty = [name for name, square in squares.items() if math.isinf(square)]
        if faulty and dist.get_rank() == 0:
            logger.warning(
                "optimizer step skipped on all ranks: the gradients of %s are not finite; look at "
                "its inputs, its loss and the learning rate of the steps before",
                " and ".join(f"module {name!r}" for name in faulty),
            )
        for update in self._updates:
            update(bool(faulty))
        self._norm = None if faulty else math.sqrt(sum(squares.values()))
        return bool(faulty)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Norm of all modules' gradients together; collective unless a step is under way."""
        norm, self._norm = self._norm, None
        return math.sqrt(sum(self._squares().values())) if norm is None else norm

    def _squares(self, prepare: bool = False) -> dict[str, float]:
        """Square of each module's norm, the same on every rank, Inf also where it is NaN."""
        squares = torch.zeros(len(self._module_infos), dtype=torch.float32, device=world_device())
        for index, info in enumerate(self._module_infos.values()):
            if info.is_active and info.optimizer:
                found_inf = prepare and info.optimizer.prepare_grads()
                norm = info.optimizer.get_grad_norm() or 0.0
                squares[index] = math.inf if found_inf else norm**2
                for grads in _beside_the_norm(info.optimizer) if prepare else ():
                    squares[index] += 0.0 * torch.stack(torch._foreach_norm(grads)).sum()
        squares.nan_to_num_(nan=math.inf, posinf=math.inf)
        numbers = torch.cat((squares, self._report.pack())) if prepare else squares
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        values = numbers.tolist()
        if prepare:
            self._report.check(values[len(squares) :], has_gradients=any(values[: len(squares)]))
        return dict(zip(self._module_infos, values, strict=False))


def _beside_the_norm(optimizer: Any) -> Iterator[list[torch.Tensor]]:
    """Gradients on this rank that Megatron's norm leaves out: copies of those of other ranks."""
    for inner in _inner(optimizer):
        counted = {id(grad) for grad in inner.get_grads_for_grad_norm()}
        grads = [
            getattr(param, "decoupled_grad", None) if param.grad is None else param.grad
            for param in inner.get_parameters()
        ]
        beside = [grad for grad in grads if grad is not None and id(grad) not in counted]
        if beside:
            yield beside


def _inner(optimizer: Any) -> list[Any]:
    """The optimizers of a module: one for its dense weights, another for experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _loss_scalers(module_infos: Iterable[Any]) -> list[Any]:
    """The dynamic loss scale of each optimizer on this rank, if it has one."""
    optimizers = [info.optimizer for info in module_infos if info.is_active and info.optimizer]
    inner = [each for optimizer in optimizers for each in _inner(optimizer)]
    scalers = [getattr(optimizer, "grad_scaler", None) for optimizer in inner]
    return [scaler for scaler in scalers if scaler is not None]


def _later(found_inf: bool) -> None:
    """Instead of a scale's own ``update``, which follows once all modules are known."""
