"""Grids and process groups of every module, made once and given back whole."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from copy import copy
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from attrs import asdict, frozen
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)

from megatron_mimo_coord.layout import (
    DIM_NAMES,
    EXPERT_DIM_NAMES,
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    Topology,
    default_topology,
    pack,
    runs_encoders_first,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import (
    Problem,
    coverage_problems,
    layout_problems,
    module_problems,
    raise_problems,
)
from megatron_mimo_coord.megatron.bridge_groups import destroy_bridge_groups
from megatron_mimo_coord.megatron.mimo_model import unwrap_mimo_model
from megatron_mimo_coord.megatron.module_configs import config_of
from megatron_mimo_coord.megatron.module_random_states import (
    forget_module_states,
    initialize_module_states,
    states_in_place,
)
from megatron_mimo_coord.megatron.random_states import global_state_problems
from megatron_mimo_coord.megatron.turns import forget_turns, take_turns
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency
from megatron_mimo_coord.world.groups import ExtraGroups
from megatron_mimo_coord.world.timeouts import world_timeout

EXPERT_VIEW = "expert"
"""The view that Megatron's ``get_mimo_optimizer`` looks up its expert groups in."""


@runtime_checkable
class Infra(Protocol):
    """What a coordinator reads: Megatron-Bridge's own ``MegatronMIMOInfra`` qualifies."""

    @property
    def module_to_grid_map(self) -> Mapping[str, HyperCommGrid]:
        """Grid of every module, on every rank."""

    @property
    def topology(self) -> Topology:
        """For each module, the modules that its output goes to."""

    @property
    def pg_collections(self) -> Mapping[str, ProcessGroupCollection | None]:
        """Process groups of the modules on this rank, None for the others."""


@runtime_checkable
class GridsAndGroups(Protocol):
    """The same under the names of Megatron-LM's ``HeteroTopology``."""

    @property
    def grids(self) -> Mapping[str, HyperCommGrid]:
        """Grid of every module, on every rank."""

    @property
    def module_pgs(self) -> Mapping[str, ProcessGroupCollection | None]:
        """Process groups of the modules on this rank; the others may be None or missing."""


@frozen(kw_only=True)
class MegatronMIMOInfra:
    """Grids and process groups of every module.

    Args:
        module_to_grid_map: grid of every module, on every rank; ``MimoModelConfig`` takes it.
        topology: for each module, the modules that its output goes to.
        pg_collections: process groups of each module on this rank, None for a module elsewhere.
        participating_modules: names of the modules on this rank.
        module_output_ndim: dims of each module's output: 2 for ``[tokens, hidden]``, which
            encoders send over a bridge, 3 for ``[sequence, batch, hidden]``.
    """

    module_to_grid_map: dict[str, HyperCommGrid]
    topology: dict[str, list[str]]
    pg_collections: dict[str, ProcessGroupCollection | None]
    participating_modules: list[str]
    module_output_ndim: dict[str, int]

    @classmethod
    def build(
        cls,
        modules: Mapping[str, ModuleParallelism],
        *,
        topology: Topology | None = None,
        module_output_ndim: Mapping[str, int] | None = None,
    ) -> "MegatronMIMOInfra":
        """Make the grids and all their process groups. Collective: every rank calls it.

        Before the model is built, call :meth:`initialize_megatron`: without random states
        Megatron's layers raise a KeyError of their own.

        Args:
            modules: parallel sizes of each module; one is named ``"language"``.
            topology: for each module, the modules that its output goes to; by default every
                encoder feeds the language model.
            module_output_ndim: dims of a module's output where it differs from the default, 2 for
                encoders and 3 for the language model.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: the layout cannot run on this world; the message lists every problem. Raised
                before any process group exists, on every rank alike.

        Example:
            On one rank, which both modules share:

            >>> vision = language = ModuleParallelism(rank_offset=0)
            >>> infra = MegatronMIMOInfra.build({"vision": vision, "language": language})
            >>> infra.participating_modules, infra.topology
            (['vision', 'language'], {'vision': ['language'], 'language': []})
            >>> infra.destroy()
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "MegatronMIMOInfra.build makes process groups: call "
                "torch.distributed.init_process_group first"
            )
        check_consistency(lambda: _statement(modules, topology, module_output_ndim))
        topology = default_topology(modules) if topology is None else topology
        grids = pack(modules)
        module_to_grid_map = {
            name: HyperCommGrid(list(grid.shape), list(DIM_NAMES), rank_offset=grid.rank_offset)
            for name, grid in grids.items()
        }
        if runs_encoders_first(grids):
            take_turns(module_to_grid_map)
        timeout = world_timeout()
        pg_collections = {
            name: _create_groups(name, grid, modules[name], timeout)
            for name, grid in module_to_grid_map.items()
        }
        return cls(
            module_to_grid_map=module_to_grid_map,
            topology={name: list(topology.get(name, [])) for name in modules},
            pg_collections=pg_collections,
            participating_modules=[name for name, groups in pg_collections.items() if groups],
            module_output_ndim=default_output_ndim(modules) | dict(module_output_ndim or {}),
        )

    def initialize_megatron(self, seed: int) -> None:
        """Make what Megatron's layers look up: random states, and the buffer that they share.

        Call it before the model is built, on every rank. Each module draws from states of its own
        place in its own grid, while it is built and, under a coordinator, while it runs: replicas
        draw the same weights, shards and pipeline stages different ones. PyTorch's own generators
        are seeded too, and between modules are those of the language model. A tracker of another
        kind that is there already, such as Transformer Engine's, keeps its kind.

        Args:
            seed: of the job.

        Example:
            >>> infra.initialize_megatron(seed=1234)
            >>> drawn = torch.rand(())
            >>> infra.initialize_megatron(seed=1234)
            >>> bool(drawn == torch.rand(()))
            True
        """
        here = [*filter(LANGUAGE.__ne__, self.participating_modules)]
        here += filter(LANGUAGE.__eq__, self.participating_modules)
        groups = {name: self.pg_collections[name] for name in here}
        initialize_module_states(seed, groups, self.module_to_grid_map)

    def random_states(self, module_name: str) -> AbstractContextManager[None]:
        """Inside, all is drawn from a module's own random states, as while it is built.

        For weights that a module gets once the model is built, such as adapters: the states in
        place are then the language model's, from which replicas of an encoder on the same ranks may
        draw different weights, and its shards the same.

        Args:
            module_name: a module on this rank.

        Raises:
            ValueError: the module is not on this rank.
            RuntimeError: :meth:`initialize_megatron` was not called.

        Example:
            >>> with infra.random_states("vision"):
            ...     adapter = torch.nn.Linear(8, 2)
        """
        if module_name not in self.participating_modules:
            raise ValueError(
                f"module {module_name!r} is not on this rank, which holds "
                f"{', '.join(self.participating_modules)}"
            )
        return states_in_place(module_name, self.module_to_grid_map)

    def is_first_stage(self, module_name: str) -> bool:
        """Whether this rank holds the first pipeline stage of a module: its ``pre_process``.

        Example:
            >>> infra.is_first_stage("vision"), infra.is_last_stage("vision")
            (True, True)
        """
        groups = self.pg_collections[module_name]
        return groups is not None and groups.pp.rank() == 0

    def is_last_stage(self, module_name: str) -> bool:
        """Whether this rank holds the last pipeline stage of a module: its ``post_process``."""
        groups = self.pg_collections[module_name]
        return groups is not None and groups.pp.rank() == groups.pp.size() - 1

    def stage_arguments(self, module_name: str) -> dict[str, Any]:
        """What a Megatron model wants to know of its place in the pipeline, as keyword arguments.

        Args:
            module_name: the module; it may be on other ranks.

        Returns:
            ``pre_process``, ``post_process`` and ``pg_collection``, as ``GPTModel`` takes them.

        Raises:
            RuntimeError: Megatron's layers would not find their random states or their buffer.

        Example:
            >>> arguments = infra.stage_arguments("language")
            >>> arguments["pre_process"], arguments["post_process"]
            (True, True)
        """
        problems = global_state_problems()
        if problems:
            raise RuntimeError("\n".join(problems))
        return {
            "pre_process": self.is_first_stage(module_name),
            "post_process": self.is_last_stage(module_name),
            "pg_collection": self.pg_collections[module_name],
        }

    def model_arguments(self) -> dict[str, dist.ProcessGroup | None]:
        """The groups over which ``MimoModel`` cuts its sequences, as keyword arguments.

        Returns:
            ``tp_group`` and ``cp_group`` of the language model, None on other ranks.

        Example:
            >>> [group.size() for group in infra.model_arguments().values()]
            [1, 1]
        """
        groups = self.pg_collections[LANGUAGE]
        return {"tp_group": groups and groups.tp, "cp_group": groups and groups.cp}

    def wrap_in_ddp(
        self,
        model: torch.nn.Module,
        ddp_config: DistributedDataParallelConfig,
        configs: Mapping[str, ModelParallelConfig] | None = None,
    ) -> None:
        """Wrap each module on this rank in Megatron's DDP, over its own groups. Collective.

        The same as ``DistributedDataParallel(config, ddp_config, module, pg_collection=...)`` for
        each, with the module's own config: the language model's, or that of the encoders inside.
        A module that is wrapped already stays as it is. ``Float16Module`` goes around modules, or
        the model, before, and gets the ``pg_collection`` that it looks for.

        Args:
            model: the ``MimoModel``, or what is around it, on its device and in its data type; what
                is frozen is frozen already.
            ddp_config: settings of every module's DDP, each of which gets a copy.
            configs: configs of modules that hold none, such as one of ``torch.nn.Linear``, or whose
                encoders have several that differ.

        Raises:
            ValueError: a module holds no config, or several that differ, and none is given, or
                Megatron's DDP refuses it; on every rank, but for Megatron's own error.
        """
        given, here = configs or {}, self.participating_modules

        def wrap() -> RankFacts:
            unknown = [
                f"there is no module {name!r}: configs may name {', '.join(self.pg_collections)}"
                for name in given
                if name not in self.pg_collections
            ]
            mimo_model = unwrap_mimo_model(model)
            for name in here if not unknown else ():
                self._wrap(mimo_model, name, ddp_config, given.get(name))
            first = LANGUAGE if LANGUAGE in here else here[0]
            for each in (model, mimo_model):
                if getattr(each, "pg_collection", None) is None:
                    each.pg_collection = self.pg_collections[first]
            return RankFacts({}, {}, unknown)

        check_consistency(wrap, "these modules cannot be wrapped")

    def _wrap(
        self,
        model: MimoModel,
        name: str,
        ddp_config: DistributedDataParallelConfig,
        config: ModelParallelConfig | None,
    ) -> None:
        """Wrap one module of this rank, unless it is wrapped."""
        module = model.language_model if name == LANGUAGE else model.modality_submodules[name]
        if any(isinstance(each, DistributedDataParallel) for each in module.modules()):
            return
        ddp = DistributedDataParallel(
            config or config_of(name, module),
            copy(ddp_config),  # where Megatron keeps a bucket size, by the module's DP
            module,
            pg_collection=self.pg_collections[name],
        )
        if name == LANGUAGE:
            model.language_model = ddp
        else:
            model.modality_submodules[name] = ddp

    def destroy(self) -> None:
        """Give every process group back, those of the bridges between the grids included.

        Collective in the sense of ``torch.distributed.destroy_process_group``: no rank may use
        the groups any more. The world itself stays.
        """
        forget_module_states(self.module_to_grid_map)
        forget_turns(self.module_to_grid_map)
        for groups in self.pg_collections.values():
            for group in (groups.embd, groups.pos_embd) if groups else ():
                if group is not None:
                    dist.destroy_process_group(group)
            if groups:
                groups.embd = groups.pos_embd = None
        for grid in self.module_to_grid_map.values():
            ExtraGroups.shared(grid).destroy()
            grid.destroy()
        destroy_bridge_groups()


def as_infra(given: Infra | GridsAndGroups) -> Infra:
    """Read grids and process groups from whatever holds them.

    Raises:
        ValueError: it has neither the attributes of ``Infra`` nor those of ``GridsAndGroups``.
    """
    if isinstance(given, Infra):
        return given
    if not isinstance(given, GridsAndGroups):
        raise ValueError(
            f"infra is of class {type(given).__name__}, which has neither module_to_grid_map, "
            f"pg_collections and topology nor grids and module_pgs; use MegatronMIMOInfra.build, "
            f"or give it those attributes"
        )
    groups = dict(given.module_pgs.items())
    return MegatronMIMOInfra(
        module_to_grid_map=dict(given.grids),
        topology=getattr(given, "topology", None) or default_topology(given.grids),
        pg_collections={name: groups.get(name) for name in given.grids},
        participating_modules=[
            n for n, grid in given.grids.items() if is_current_rank_in_grid(grid)
        ],
        module_output_ndim=default_output_ndim(given.grids),
    )


def _statement(modules: Any, topology: Any, module_output_ndim: Any) -> RankFacts:
    """What ``MegatronMIMOInfra.build`` was given, and all that is wrong with it."""
    facts = {**topology_facts(topology), "module_output_ndim": module_output_ndim}
    problems = _problems(modules, topology, module_output_ndim)
    if isinstance(modules, Mapping):
        for name, module in modules.items():
            sizes = asdict(module) if isinstance(module, ModuleParallelism) else {"sizes": module}
            facts |= {f"{name}: {field}": value for field, value in sizes.items()}
        facts["the modules"] = ", ".join(map(str, modules))
    return RankFacts({name: str(value) for name, value in facts.items()}, {}, problems)


def topology_facts(topology: Any) -> dict[str, str]:
    """What ranks must agree about in a topology, module by module."""
    if not isinstance(topology, Mapping):
        return {"topology": str(topology)}
    return {f"{name}: topology": str(targets) for name, targets in topology.items()}


def _problems(modules: Any, topology: Any, module_output_ndim: Any) -> list[Problem]:
    """All that is wrong with what ``MegatronMIMOInfra.build`` was given."""
    problems = module_problems(modules)
    if problems:
        return problems
    if topology is None:
        topology = default_topology(modules)
    problems = layout_problems(pack(modules), topology, dist.get_world_size())
    ndims = {} if module_output_ndim is None else module_output_ndim
    if not isinstance(ndims, Mapping) or any(
        name not in modules or ndim not in (2, 3) for name, ndim in ndims.items()
    ):
        problems.append(
            Problem(
                f"module_output_ndim must give 2 ([tokens, hidden]) or 3 ([sequence, batch, "
                f"hidden]) for some of the modules {', '.join(modules)}, got {ndims!r}"
            )
        )
    return problems


def default_output_ndim(names: Mapping[str, object]) -> dict[str, int]:
    """Encoders hand over ``[tokens, hidden]``, the language model ``[sequence, batch, hidden]``."""
    return {name: 3 if name == LANGUAGE else 2 for name in names}


def _create_groups(
    name: str, grid: HyperCommGrid, module: ModuleParallelism, timeout: timedelta | None
) -> ProcessGroupCollection | None:
    """Make every group of a grid, in one order on every rank, and collect those of this rank."""
    grid.register_view(
        EXPERT_VIEW, list(module.expert_shape), list(EXPERT_DIM_NAMES), shared_dims=["pp"]
    )
    dense = {
        "tp": "tp",
        "cp": "cp",
        "dp": "dp",
        "pp": "pp",
        "tp_cp": ["tp", "cp"],
        "dp_cp": ["dp", "cp"],
        "mp": ["tp", "pp"],
        "tp_dp_cp": ["tp", "dp", "cp"],
        "intra_dist_opt": ["tp", "cp", "dp", "pp"],
    }
    expert = {
        "expt_tp": "expt_tp",
        "ep": "ep",
        "expt_dp": "expt_dp",
        "tp_ep": ["expt_tp", "ep"],
        "tp_ep_pp": ["expt_tp", "ep", "pp"],
    }
    groups: dict[str, Any] = {
        key: grid.create_pg(dims, view=view, timeout=timeout, group_desc=f"{name} {key}")
        for view, dims_of in ((None, dense), (EXPERT_VIEW, expert))
        for key, dims in dims_of.items()
    }
    if name == LANGUAGE:
        groups |= _create_embedding_groups(grid, timeout)
    if not grid.is_current_rank_in_grid():
        return None
    dp_cp, expt_dp = groups["dp_cp"], groups["expt_dp"]
    return ProcessGroupCollection(
        **groups,
        intra_dp_cp=dp_cp,
        intra_expt_dp=expt_dp,
        dp_cp_gtp_remat=dp_cp,  # the same ranks where weights are not rematerialised by GTP
        expt_dp_gtp_remat=expt_dp,
    )


def _create_embedding_groups(grid: HyperCommGrid, timeout: timedelta | None) -> dict[str, Any]:
    """First and last stage share tied word embeddings; the first has the position embeddings."""
    groups = {}
    for stages in grid.get_rank_enum("pp"):
        for key, ranks in (
            ("embd", sorted({stages[0], stages[-1]})),
            ("pos_embd", [stages[0]]),
        ):
            group = dist.new_group(ranks, timeout=timeout, group_desc=f"{LANGUAGE} {key}")
            if dist.get_rank() in ranks:
                groups[key] = group
    return groups


def schedule_pg_collection(infra: Infra, names: Iterable[str]) -> MultiModuleProcessGroupCollection:
    """Process groups of some modules on this rank, as the schedule wants them."""
    here = {name: infra.pg_collections[name] for name in names}
    collection = MultiModuleProcessGroupCollection(
        module_pgs=here, language_model_module_name=LANGUAGE if LANGUAGE in here else None
    )
    language = here.get(LANGUAGE)
    if language is not None:  # forward_backward_no_pipelining looks for these two
        collection.tp = language.tp
        collection.cp = language.cp
    return collection


def is_current_rank_in_grid(grid: HyperCommGrid) -> bool:
    """Whether this rank is one of the grid's.

    Args:
        grid: a ``HyperCommGrid``, or whatever has its ``rank_offset`` and ``size``.

    Example:
        >>> is_current_rank_in_grid(infra.module_to_grid_map["vision"])
        True
    """
    return dist.get_rank() in _ranks(grid)


def _ranks(grid: HyperCommGrid) -> range:
    return range(grid.rank_offset, grid.rank_offset + grid.size)


def validate_no_stub_ranks(
    module_to_grid_map: Mapping[str, HyperCommGrid], world_size: int
) -> None:
    """Check that every rank of the world is in a module. Costs O(modules), not O(ranks).

    Args:
        module_to_grid_map: grid of every module.
        world_size: ranks in the job.

    Raises:
        ValueError: ranks are in no module, or a grid reaches beyond the world; the message names
            the ranks, the modules and what to change.

    Example:
        >>> validate_no_stub_ranks(infra.module_to_grid_map, world_size=2)
        Traceback (most recent call last):
        ValueError: not every rank has work:
          - rank 1 of 2 is in no module; make a module larger, move one there with rank_offset, \
or launch fewer ranks
    """
    ranks_of = {name: _ranks(grid) for name, grid in module_to_grid_map.items()}
    raise_problems("not every rank has work", coverage_problems(ranks_of, world_size))


def validate_data_loader_contract(
    infra: Infra | GridsAndGroups,
    global_batch_size: int,
    micro_batch_size: int,
    num_microbatches: int,
) -> None:
    """Check that a batch can be dealt out to every module.

    Args:
        infra: the layout.
        global_batch_size: samples in an optimizer step, over all ranks.
        micro_batch_size: samples in a microbatch over all ranks, before each module slices it
            among its data-parallel ranks.
        num_microbatches: microbatches in an optimizer step.

    Raises:
        ValueError: the global batch or the microbatch does not divide by a module's DP, or
            ``num_microbatches * micro_batch_size != global_batch_size``; all problems at once.

    Example:
        >>> validate_data_loader_contract(infra, 512, 32, num_microbatches=16)
    """
    given: Any = infra
    has_map = hasattr(given, "module_to_grid_map")
    grid_of = given.module_to_grid_map if has_map else given.grids
    grids = [ModuleGrid.of(name, grid) for name, grid in grid_of.items()]
    raise_problems(
        "this batch cannot be dealt out",
        batch_problems(grids, global_batch_size, micro_batch_size, num_microbatches),
    )
