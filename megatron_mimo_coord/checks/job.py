"""What a coordinator is given: read on each rank, compared across all, refused on all alike."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from attrs import field, frozen
from megatron.core import __version__ as megatron_version
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.checks.modules import (
    find_ddp,
    module_facts,
    module_problems_here,
    weight_problems_here,
)
from megatron_mimo_coord.checks.replicas import check_replicas
from megatron_mimo_coord.infra import GridsAndGroups, Infra, as_infra, topology_facts
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, gradient_scaling_factor
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp
from megatron_mimo_coord.megatron.empty_batches import meets_replicas
from megatron_mimo_coord.megatron.forwards import Forwards
from megatron_mimo_coord.megatron.mimo_model import unsupported, unwrap_mimo_model
from megatron_mimo_coord.megatron.names import told_of_missing_names
from megatron_mimo_coord.megatron.random_states import global_state_problems, needs_global_state
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency


@frozen
class Job:
    """The training job that all ranks agree about, as one rank sees it.

    Args:
        rank: this rank.
        infra: grids and process groups.
        model: the ``MimoModel``.
        grids: where each module lies.
        ddps: the DDP of each module on this rank, in the order of ``grids``.
        groups: their process groups.
        per_token: whether the loss is divided by the number of tokens.
        gradient_scaling_factors: c_m of every module of the job, without the 1/N of a step.
        meeting: of every module, whether its replicas meet in its forward.

    Attributes:
        changes: where is recorded what is changed in the model, its DDPs, configs and optimizers.
        forwards: those of the model.
    """

    rank: int
    infra: Infra
    model: MimoModel
    grids: Mapping[str, ModuleGrid]
    ddps: Mapping[str, DistributedDataParallel]
    groups: Mapping[str, ProcessGroupCollection]
    per_token: bool
    gradient_scaling_factors: Mapping[str, float]
    meeting: Mapping[str, bool]
    changes: Changes = field(init=False, factory=Changes)
    forwards: Forwards = field(init=False)

    @forwards.default
    def _forwards(self) -> Forwards:
        return Forwards(self.model, self.changes)

    @classmethod
    def agree(cls, infra: Infra | GridsAndGroups, model: torch.nn.Module) -> "Job":
        """Read what this rank was given and compare it with all ranks. Collective over the world.

        Raises:
            ValueError: on every rank, if the layout cannot run, a module is not as it must be,
                ranks were given different things, or replicas hold different weights; with every
                problem found.
            RuntimeError: ``model`` holds no ``MimoModel``; the other ranks raise a ValueError.
        """
        read: dict[str, Any] = {}
        flags = check_consistency(partial(_read, infra, model, read))
        check_replicas(list(read["grids"]), read["ddps"], read["groups"])
        grids, factors, meeting = read["grids"], {}, {}
        for index, name in enumerate(sorted(grids)):
            of_module = flags[grids[name].rank_offset] >> 2 * index
            meeting[name] = bool(of_module & _MEETS)
            factors[name] = gradient_scaling_factor(
                grids[name].replicas,
                grids[LANGUAGE].replicas,
                ddp_sums=bool(of_module & _SUMS),
                per_token=read["per_token"],
            )
        return cls(rank=dist.get_rank(), **read, gradient_scaling_factors=factors, meeting=meeting)


_SUMS, _MEETS = 1, 2
"""What a rank tells others of each of its modules: its DDP delivers sums, its replicas meet."""


@told_of_missing_names()
def _read(infra: Infra | GridsAndGroups, model: torch.nn.Module, read: dict[str, Any]) -> RankFacts:
    """Fill in what a ``Job`` holds; returns what there is to say about it to the other ranks."""
    infra = as_infra(infra)
    mimo_model = unwrap_mimo_model(model)
    grids = {name: ModuleGrid.of(name, grid) for name, grid in infra.module_to_grid_map.items()}
    here = [name for name, grid in grids.items() if dist.get_rank() in grid.ranks]
    found = {name: find_ddp(mimo_model, name) for name in here}
    ddps = {name: ddp for name, ddp in found.items() if ddp is not None}
    per_token = bool(mimo_model.config.calculate_per_token_loss)
    read |= {"infra": infra, "model": mimo_model, "grids": grids}
    read |= {"ddps": ddps, "per_token": per_token}
    read["groups"] = {name: infra.pg_collections.get(name) for name in ddps}

    problems: list[str] = [*layout_problems(grids, infra.topology, dist.get_world_size())]
    problems += unsupported(mimo_model)
    for name in here:
        problems += module_problems_here(mimo_model, infra, grids[name])
    if len(ddps) == len(here):
        problems += weight_problems_here(mimo_model, ddps)
    if any(needs_global_state(ddp) for ddp in ddps.values()):
        problems += global_state_problems()
    return RankFacts(
        job={
            "megatron-core version": megatron_version,
            "the modules": ", ".join(grids),
            **topology_facts(infra.topology),
            "calculate_per_token_loss of the language model": str(per_token),
            **{
                f"{name}: {field}": value
                for name, grid in grids.items()
                for field, value in grid.fields().items()
            },
        },
        modules={name: module_facts(ModuleDdp(ddp)) for name, ddp in ddps.items()},
        problems=problems,
        flags=sum(
            (
                _SUMS * ModuleDdp(ddps[name]).delivers_sum
                + _MEETS * meets_replicas(ddps[name], grids[name].replica(dist.get_rank()))
            )
            << 2 * index
            for index, name in enumerate(sorted(grids))
            if name in ddps
        ),
    )
