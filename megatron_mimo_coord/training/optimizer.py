"""Builds Megatron's ``MimoOptimizer`` on every layout.

Megatron's ``get_mimo_optimizer`` builds the optimizers of a rank's modules in turn, and for each
all ranks of the world tell each other their parameter groups. Where one rank has more modules than
another, some wait for ever. Here all ranks build as many: one that has no module left builds an
optimizer of a module without parameters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.checks.job import Job
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
    optimizers = {
        name: _optimizer_of(ddp, job.infra.pg_collections[name], config)
        for name, ddp in job.ddps.items()
    }
    name, ddp = next(iter(job.ddps.items()))
    for _ in range(_most_modules_on_a_rank(job) - len(job.ddps)):
        pg_collection = job.infra.pg_collections[name]
        _optimizer_of(_without_parameters(ddp, pg_collection), pg_collection, config)
    infos = {
        name: ModuleOptimizerInfo(
            optimizer=optimizers.get(name),
            grid=grid,
            pg_collection=job.infra.pg_collections.get(name),
            is_active=name in optimizers,
        )
        for name, grid in job.infra.module_to_grid_map.items()
    }
    return MimoOptimizer(infos, config)


def _optimizer_of(
    ddp: DistributedDataParallel,
    pg_collection: ProcessGroupCollection | None,
    config: OptimizerConfig,
) -> Any:
    return get_megatron_optimizer(
        config=config,
        model_chunks=[ddp],
        pg_collection=pg_collection,
        use_gloo_process_groups=False,
    )


def _without_parameters(
    ddp: DistributedDataParallel, pg_collection: ProcessGroupCollection | None
) -> DistributedDataParallel:
    return DistributedDataParallel(
        config=ddp.config,
        ddp_config=ddp.ddp_config,
        module=torch.nn.Module(),
        pg_collection=pg_collection,
    )


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
