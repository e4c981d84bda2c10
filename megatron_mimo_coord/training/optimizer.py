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
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.megatron.optimizers import (
    build_mimo_optimizer,
    conflicting_overrides,
    overrides_of_module,
)
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

_SETTINGS = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult")
Overrides = Mapping[str | ParamKey, ParamGroupOverride]


def build_optimizer(job: Job, config: OptimizerConfig, given: Overrides) -> MimoOptimizer:
    """Megatron's optimizer of all modules. Collective over the world.

    Raises:
        ValueError: on every rank, if the config does not fit a module's DDP, or settings do not
            fit each other.
    """
    overrides = {name: overrides_of_module(name, config, given) for name in job.grids}
    check_consistency(
        lambda: _facts(job, config, given, overrides), "the optimizer cannot be built"
    )
    ranks = [rank for grid in job.grids.values() for rank in grid.ranks]
    return build_mimo_optimizer(
        job.ddps,
        job.infra.module_to_grid_map,
        job.infra.pg_collections,
        config,
        overrides,
        count=max(ranks.count(grid.rank_offset) for grid in job.grids.values()),
    )


def _facts(
    job: Job,
    config: OptimizerConfig,
    given: Overrides,
    overrides: Mapping[str, Mapping[ParamKey, ParamGroupOverride]],
) -> RankFacts:
    """What the ranks must agree about, and what keeps this one from building its optimizers."""
    problems = [
        f"there is no module {key!r}: config_overrides may name {', '.join(job.grids)}"
        for key in given
        if isinstance(key, str) and key not in job.grids
    ]
    problems += [
        f"{key!r} has no {name}: config_overrides may have {', '.join(_SETTINGS)}"
        for key, override in given.items()
        for name in override
        if name not in _SETTINGS
    ]
    for name, ddp in job.ddps.items():
        settings = ddp.ddp_config
        if settings.use_distributed_optimizer != config.use_distributed_optimizer:
            problems.append(
                f"use_distributed_optimizer is {config.use_distributed_optimizer} in the "
                f"optimizer's config, but {settings.use_distributed_optimizer} in the DDP of "
                f"module {name!r}: give both the same"
            )
        problems += conflicting_overrides(ddp, overrides[name])
        if settings.num_distributed_optimizer_instances > 1:
            problems.append(
                f"the DDP of module {name!r} has num_distributed_optimizer_instances "
                f"{settings.num_distributed_optimizer_instances}, and Megatron's MimoOptimizer "
                f"takes 1"
            )
    settings_here: Mapping[str, Any] = vars(config)
    plain = (bool, int, float, str, torch.dtype, type(None))
    facts = {name: str(value) for name, value in settings_here.items() if isinstance(value, plain)}
    for key, override in given.items():
        facts |= {f"{_words(key)}: {name}": str(value) for name, value in override.items()}
    return RankFacts(facts, {}, problems)


def _words(key: str | ParamKey) -> str:
    """A key without the addresses of functions, which differ between ranks."""
    if isinstance(key, str):
        return key
    predicates = [key.predicate, key.with_name_predicate]
    return str((key.name, key.attr, [getattr(each, "name", len(each)) for each in predicates]))
