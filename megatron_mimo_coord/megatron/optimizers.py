"""Megatron's optimizers: one for each module, in a ``MimoOptimizer``.

Leans on ``MimoOptimizer`` keeping the optimizer of each module (``module_infos``) and calling its
own ``prepare_grads`` and then ``get_grad_norm`` in every step; and on how the optimizers inside
find Inf, measure and scale. Without these, steps that are not finite cannot be skipped on all ranks
alike, and the loss scales of fp16 drift apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.world.device import world_device

UPDATE = "step_with_ready_grads"
"""The method of an optimizer that updates parameters, once gradients are scaled and clipped."""


class ModuleOptimizer:
    """The optimizer of one module on this rank.

    Args:
        optimizer: Megatron's; one that chains others where a module has experts.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._inner: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])

    def prepare(self) -> bool:
        """Get the gradients ready; whether Inf was found where a loss is scaled."""
        return bool(self._optimizer.prepare_grads())

    def norm(self) -> float:
        """Megatron's norm of the gradients, without overflow. Collective in the module."""
        norm = self._optimizer.get_grad_norm() or 0.0
        if not math.isinf(norm):
            return float(norm)
        square = 0.0  # of finite gradients too large to be squared in fp32, or one of them is Inf
        for inner in self._inner:
            norms = [
                torch.linalg.vector_norm(grad, dtype=torch.float64)
                for grad in inner.get_grads_for_grad_norm()
            ]
            squares = torch.tensor(0.0, dtype=torch.float64, device=world_device())
            squares = torch.stack([squares, *norms]).square().sum()
            dist.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
            square += squares.item()
        return math.sqrt(square)

    def beside_the_norm(self) -> list[torch.Tensor]:
        """Gradients on this rank that the norm leaves out: copies of those of other ranks."""
        beside = []
        for inner in self._inner:
            counted = {id(grad) for grad in inner.get_grads_for_grad_norm()}
            grads = [
                getattr(param, "decoupled_grad", None) if param.grad is None else param.grad
                for param in inner.get_parameters()
            ]
            beside += [grad for grad in grads if grad is not None and id(grad) not in counted]
        return beside

    def defer_loss_scale(self, changes: Changes) -> list[Callable[[bool], None]]:
        """Have the dynamic loss scales wait for what becomes of the step; how to tell them."""
        scalers = [getattr(inner, "grad_scaler", None) for inner in self._inner]
        updates = []
        for scaler in filter(None, scalers):
            updates.append(scaler.update)
            changes.set(scaler, "update", _wait)
        return updates


def _wait(found_inf: bool) -> None:
    """Instead of a scale's own ``update``, which follows once all modules are known."""


def overrides_of_module(
    name: str, config: OptimizerConfig, given: Mapping[str | ParamKey, ParamGroupOverride]
) -> dict[ParamKey, ParamGroupOverride]:
    """Which of a module's parameters have other settings than ``config``: Megatron's, and given."""
    standard = get_standard_config_overrides(config)
    exempt = [key for key, override in standard.items() if "wd_mult" in override]
    decays = ParamWithNamePredicate(
        "decays", lambda param, at: not any(key.matches(param, at) for key in exempt)
    )
    found = dict(standard)
    for key, override in given.items():
        settings = dict(override)
        if "max_lr" in settings:
            settings["lr"] = settings["max_lr"]  # until a scheduler says otherwise
        if isinstance(key, ParamKey):
            found[key] = settings
        elif key == name:
            if "wd_mult" in settings:  # of what Megatron does not exempt from weight decay
                found[ParamKey(with_name_predicate=decays)] = {"wd_mult": settings.pop("wd_mult")}
            found[ParamKey(name="*")] = settings
    return found


def conflicting_overrides(
    ddp: DistributedDataParallel, overrides: Mapping[ParamKey, ParamGroupOverride]
) -> Iterator[str]:
    """Of which parameters two overrides say different things."""
    for name, param in ddp.named_parameters():
        try:
            combine_param_group_overrides(
                [said for key, said in overrides.items() if key.matches(param, name)]
            )
        except ValueError as error:
            yield f"{name.removeprefix('module.')}: {error}"


def build_mimo_optimizer(
    ddps: Mapping[str, DistributedDataParallel],
    grids: Mapping[str, HyperCommGrid],
    pg_collections: Mapping[str, ProcessGroupCollection | None],
    config: OptimizerConfig,
    overrides: Mapping[str, Mapping[ParamKey, ParamGroupOverride]],
    count: int,
) -> MimoOptimizer:
    """Megatron's optimizers of all modules, as one. Collective over the world.

    Args:
        ddps, pg_collections: the modules on this rank, and their process groups.
        grids: of all modules.
        config, overrides: settings of all, and of some parameters of each module.
        count: how many every rank builds, be it of modules without parameters.
    """

    def build(name: str, ddp: DistributedDataParallel) -> Any:
        return get_megatron_optimizer(
            config=config,
            config_overrides=dict(overrides[name]),
            model_chunks=[ddp],
            pg_collection=pg_collections[name],
            use_gloo_process_groups=False,
        )

    optimizers = {name: build(name, ddp) for name, ddp in ddps.items()}
    name, ddp = next(iter(ddps.items()))
    for _ in range(count - len(ddps)):
        empty = DistributedDataParallel(
            config=ddp.config,
            ddp_config=ddp.ddp_config,
            module=torch.nn.Module(),
            pg_collection=pg_collections[name],
        )
        build(name, empty)
    infos = {
        name: ModuleOptimizerInfo(
            optimizer=optimizers.get(name),
            grid=grid,
            pg_collection=pg_collections.get(name),
            is_active=name in optimizers,
        )
        for name, grid in grids.items()
    }
    return MimoOptimizer(infos, config)


def optimizers_here(optimizer: MimoOptimizer) -> dict[str, Any]:
    """Megatron's optimizer of each module on this rank."""
    infos = optimizer.module_infos.items()
    return {name: info.optimizer for name, info in infos if info.is_active and info.optimizer}


def module_names(optimizer: MimoOptimizer) -> list[str]:
    """All modules of the job, in one order on every rank."""
    return sorted(optimizer.module_infos)


def route_decision(
    optimizer: MimoOptimizer,
    skips: Callable[[], bool],
    norm: Callable[[], float],
    changes: Changes,
) -> None:
    """Have others say whether to skip a step, and by which norm to clip; in this order."""
    changes.set(optimizer, "prepare_grads", skips)
    changes.set(optimizer, "get_grad_norm", norm)


def route_step(
    optimizer: Any, before: Callable[[], None], after: Callable[[], None], changes: Changes
) -> None:
    """Around the ``step`` of an optimizer, if it has one."""
    step = getattr(optimizer, "step", None)
    if step is None:
        return

    @wraps(step)
    def watched(*args: Any, **options: Any) -> Any:
        before()
        outcome = step(*args, **options)
        after()
        return outcome

    changes.set(optimizer, "step", watched)


def updates(optimizer: Any, modules: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Of each module here, the object and the method that update its parameters.

    Args:
        optimizer: a ``MimoOptimizer``, or another of Megatron's, which is that of the first module.
        modules: the modules on this rank.
    """
    if isinstance(optimizer, MimoOptimizer):
        found = optimizers_here(optimizer)
    else:
        found = {next(iter(modules)): optimizer}
    return {name: (each, UPDATE) for name, each in found.items() if hasattr(each, UPDATE)}
