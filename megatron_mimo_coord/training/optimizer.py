"""Builds Megatron's ``MimoOptimizer`` on every layout.

Megatron's ``get_mimo_optimizer`` builds the optimizers of a rank's modules in turn, and for each
all ranks of the world tell each other their parameter groups. Where one rank has more modules than
another, some wait for ever. Here all ranks build as many: one that has no module left builds an
optimizer of a module without parameters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.megatron.optimizers import (
    mimo_optimizer,
    optimizer_of,
    without_parameters,
)
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency


def build_optimizer(job: Job, config: OptimizerConfig) -> MimoOptimizer:
    """Megatron's optimizer of all modules. Collective over the world.

    Args:
        job: the modules, their grids, and which of them are here.
        config: settings of every module's optimizer.

    Raises:
        ValueError: on every rank, if the config does not fit a module's DDP.
    """
    check_consistency(lambda: _facts(job, config), "the optimizer cannot be built")
    groups = job.infra.pg_collections
    optimizers = {name: optimizer_of(ddp, groups[name], config) for name, ddp in job.ddps.items()}
    name, ddp = next(iter(job.ddps.items()))
    for _ in range(_most_modules_on_a_rank(job) - len(job.ddps)):
        optimizer_of(without_parameters(ddp, groups[name]), groups[name], config)
    return mimo_optimizer(optimizers, job.infra.module_to_grid_map, groups, config)


def _most_modules_on_a_rank(job: Job) -> int:
    ranks = [rank for grid in job.grids.values() for rank in grid.ranks]
    return max(ranks.count(grid.rank_offset) for grid in job.grids.values())


def _facts(job: Job, config: OptimizerConfig) -> RankFacts:
    """What the ranks must agree about, and what keeps this one from building its optimizers."""
    problems = []
    for name, ddp in job.ddps.items():
        settings = ddp.ddp_config
        if settings.use_distributed_optimizer != config.use_distributed_optimizer:
            problems.append(
                f"use_distributed_optimizer is {config.use_distributed_optimizer} in the "
                f"optimizer's config, but {settings.use_distributed_optimizer} in the DDP of "
                f"module {name!r}: give both the same"
            )
        if settings.num_distributed_optimizer_instances > 1:
            problems.append(
                f"the DDP of module {name!r} has num_distributed_optimizer_instances "
                f"{settings.num_distributed_optimizer_instances}, and Megatron's MimoOptimizer "
                f"takes 1"
            )
    settings_here: Mapping[str, Any] = vars(config)
    plain = (bool, int, float, str, torch.dtype, type(None))
    facts = {name: str(value) for name, value in settings_here.items() if isinstance(value, plain)}
    return RankFacts(facts, {}, problems)
