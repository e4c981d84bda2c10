"""The one object that a MIMO trainer holds, and whose methods the Megatron schedule calls."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core import __version__ as megatron_version
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)

from megatron_mimo_coord import infra as infrastructure
from megatron_mimo_coord.bridges.colocated import (
    allow_varying_token_counts as let_colocated_token_counts_vary,
)
from megatron_mimo_coord.bridges.communicator import (
    TokenCounts,
    VaryingTokensCommunicator,
    fan_in_encoders,
)
from megatron_mimo_coord.checks.modules import (
    facts,
    find_ddp,
    module_problems_here,
    sums,
    unwrap_mimo_model,
)
from megatron_mimo_coord.gradients.buckets import grad_buffers
from megatron_mimo_coord.gradients.finite_steps import FiniteSteps
from megatron_mimo_coord.gradients.launch_order import OrderedReduction
from megatron_mimo_coord.gradients.norms import GradientShares
from megatron_mimo_coord.gradients.scaling import GradientNormalizer
from megatron_mimo_coord.infra import GridsAndGroups, Infra, as_infra, default_output_ndim
from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    gradient_scaling_factor,
    is_colocated,
)
from megatron_mimo_coord.layout.batch import data_parallel_slice
from megatron_mimo_coord.layout.description import describe, summarize
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.metrics.losses import reduce_losses
from megatron_mimo_coord.metrics.profiler_ranges import named_range
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)

HOOKS = (
    "no_sync_func",
    "finalize_model_grads_func",
    "grad_scale_func",
    "grad_sync_func",
    "param_sync_func",
)


@frozen
class _Module:
    """A module that lives on this rank, with all that finalizing its gradients takes."""

    name: str
    ddp: DistributedDataParallel
    grid: HyperCommGrid
    pg_collection: ProcessGroupCollection
    groups_to_finalize: ProcessGroupCollection
    reduction: OrderedReduction
    normalizer: GradientNormalizer


class MultiModuleCoordinator:
    """Holds, on every rank, which modules live there and how their gradients become the loss's.

    Build it once, on every rank, when the submodules are wrapped in DDP; then call :meth:`attach`.
    The ranks compare what they were given with one small collective.

    Args:
        infra: grids and process groups: a ``MegatronMIMOInfra``, this package's or
            Megatron-Bridge's, or any object with ``module_to_grid_map``, ``pg_collections`` and
            ``topology``; or one with ``grids`` and ``module_pgs``, as Megatron-LM's
            ``HeteroTopology``.
        model: the ``MimoModel``, its submodules wrapped in Megatron's ``DistributedDataParallel``;
            ``Float16Module`` may be around it, around its submodules, or both.

    Raises:
        ValueError: the layout cannot run, the model lacks a module or its DDP, or ranks disagree;
            raised on every rank alike, with every problem found.
        RuntimeError: ``model`` holds no ``MimoModel``; on the ranks where it does, the others
            raise a ValueError that says so.

    Example:
        >>> coordinator = MultiModuleCoordinator(infra, model)
        >>> coordinator.attach(model.config)
        >>> print(coordinator.describe(micro_batch_size=8))
        1 rank, modules colocated; 1 pipeline stage; 8 samples at a time; mean loss
        module    ranks  TP  CP  PP  DP  samples/rank  gradient x  bridge
        vision    0      1   1   1   1   8             1           one to one 1:1
        language  0      1   1   1   1   8             1
    """

    def __init__(self, infra: Infra | GridsAndGroups, model: torch.nn.Module) -> None:
        self._rank = dist.get_rank()
        flags = check_consistency(lambda: self._read(infra, model))
        self._device = world_device()
        self._factors = self._factors_of(flags)
        self._modules = tuple(self._collect(name) for name in self._names_here)
        self._ddps = tuple(module.ddp for module in self._modules)
        self._module_to_grid_tuples = tuple((module.ddp, module.grid) for module in self._modules)
        self._schedule_pg_collection = self._collect_for_schedule()
        self._token_counts = TokenCounts.of(
            self._model, fan_in_encoders(self._grids, self._infra.topology)
        )
        self._config: ModelParallelConfig | None = None
        self._hooks: dict[str, Any] = {}
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._device)
        self._counts_tokens = self._is_token_counter()
        self._needs_tokens = self._per_token and self._rank in self._grids[LANGUAGE].ranks
        self._grads = [buffer.grad_data for ddp in self._ddps for buffer in grad_buffers(ddp)]
        # No step has begun: as far as finalize_model_grads can see, the last one is over.
        self._finalized: list[int] | None = self._versions()
        if self._rank == 0:
            logger.info("%s", self.describe())

    # -- what lives on this rank -------------------------------------------------------------------

    @property
    def module_to_grid_tuples(self) -> tuple[tuple[DistributedDataParallel, HyperCommGrid], ...]:
        """(module, grid) of every module on this rank; the module is its DDP.

        Example:
            >>> [type(module).__name__ for module, grid in coordinator.module_to_grid_tuples]
            ['DistributedDataParallel', 'DistributedDataParallel']
        """
        return self._module_to_grid_tuples

    @property
    def active_module_pg(self) -> tuple[str, ProcessGroupCollection]:
        """(name, process groups) of the one module on this rank.

        Raises:
            RuntimeError: several modules live on this rank; use ``schedule_pg_collection``.
        """
        module = self._only_module("active_module_pg", "schedule_pg_collection")
        return module.name, module.pg_collection

    @property
    def schedule_pg_collection(self) -> MultiModuleProcessGroupCollection:
        """Process groups of this rank's modules, as the schedule's ``pg_collection``."""
        return self._schedule_pg_collection

    @property
    def gradient_scaling_factors(self) -> Mapping[str, float]:
        """For each module on this rank, the factor from DDP's result to the gradient of the loss.

        Of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`: encoder DP / language DP for
        a mean loss where both modules average. With a per-token loss it lacks the 1/N, which only
        each step knows. It is applied already: nothing is left to multiply.

        Example:
            >>> coordinator.gradient_scaling_factors["vision"]
            1.0
        """
        return MappingProxyType({name: self._factors[name] for name in self._names_here})

    @property
    def gradient_scaling_factor(self) -> float:
        """The factor of the one module on this rank.

        Raises:
            RuntimeError: several modules live on this rank; use ``gradient_scaling_factors``.
        """
        module = self._only_module("gradient_scaling_factor", "gradient_scaling_factors")
        return self._factors[module.name]

    # -- what the trainer calls --------------------------------------------------------------------

    def attach(self, config: ModelParallelConfig, optimizer: Any = None) -> None:
        """Hand this coordinator's methods to the schedule, through the model's config.

        Sets ``no_sync_func`` and ``finalize_model_grads_func``; with an optimizer
        ``grad_scale_func``; where a module's DDP has ``overlap_grad_reduce`` also
        ``grad_sync_func``; with ``overlap_param_gather`` and ``align_param_gather`` also
        ``param_sync_func``. Attaching again, or a later coordinator of the same config, is fine.

        Args:
            config: the language model's config, ``get_model_config(model)``.
            optimizer: Megatron's optimizer, whose ``scale_loss`` scales the loss. A
                ``MimoOptimizer`` skips steps from now on, on all ranks alike, in which a module's
                gradients are not finite, and the first rank logs which module it is.

        Raises:
            ValueError: someone else has set one of these hooks, or the modules are on disjoint
                ranks and ``variable_seq_lengths`` is off. Nothing is set then.

        Example:
            >>> coordinator.attach(model.config)
            >>> model.config.finalize_model_grads_func == coordinator.finalize_model_grads
            True
        """
        if not config.variable_seq_lengths and not is_colocated(self._grids.values()):
            raise ValueError(
                "modules on disjoint ranks exchange tensors whose shapes vary, but "
                "config.variable_seq_lengths is False: set it to True (a mixture-of-experts model "
                'then needs moe_token_dispatcher_type="alltoall")'
            )
        hooks = self._hooks_for(optimizer)
        owners = [getattr(getattr(config, name), "__self__", None) for name in HOOKS]
        ours = [
            hook
            for owner in owners
            if isinstance(owner, MultiModuleCoordinator)
            for hook in owner._hooks.values()
        ]
        for name, hook in hooks.items():
            current = getattr(config, name)
            if current not in (None, hook, *ours):
                raise ValueError(
                    f"config.{name} is already {current!r}; the coordinator needs that place: set "
                    f"config.{name} = None before attach, and leave it to the coordinator"
                )
        for name in HOOKS:
            owner = getattr(getattr(config, name), "__self__", None)
            if name in hooks:
                setattr(config, name, hooks[name])
            elif isinstance(owner, MultiModuleCoordinator) and owner is not self:
                setattr(config, name, None)  # the coordinator before this one needed it
        self._hooks |= hooks
        self._config = config
        FiniteSteps.of(optimizer)

    def build_pipeline_communicator(self, config: ModelParallelConfig) -> VaryingTokensCommunicator:
        """Make the schedule's ``p2p_communicator``, once, outside the loop. Collective.

        Samples may have no, one or many images, and encoders any DP that divides or is a multiple
        of the language model's. Colocated modules send nothing between ranks; with this
        communicator the same schedule runs them too.

        Args:
            config: the language model's config, with ``pipeline_dtype``.

        Raises:
            ValueError: ranks send to each other and ``pipeline_dtype`` is not set.
        """
        colocated = is_colocated(self._grids.values())
        has_stages = any(grid.dim("pp") > 1 for grid in self._grids.values())
        if config.pipeline_dtype is None and (has_stages or not colocated):
            raise ValueError(
                "config.pipeline_dtype is None, so a receiver cannot know what it is sent: set it "
                "to the dtype of the activations, such as torch.bfloat16"
            )
        topology = self._infra.topology
        self._token_counts.let_vary()
        if colocated:
            let_colocated_token_counts_vary(self._model)
        return VaryingTokensCommunicator(
            self._infra.module_to_grid_map,
            {name: [] if colocated else topology.get(name, []) for name in self._grids},
            config,
            getattr(self._infra, "module_output_ndim", None) or default_output_ndim(self._grids),
        )

    def zero_grad_buffer(self) -> None:
        """Set the gradients of every module on this rank to zero, before a step."""
        self._finalized = None
        for ddp in self._ddps:
            ddp.zero_grad_buffer()
            for param in ddp.params_with_grad:
                # An optimizer in fp32 leaves main_grad here, where backward would add to it twice.
                param.grad = None

    def data_parallel_slice(self, micro_batch_size: int, module_name: str | None = None) -> slice:
        """Samples of a microbatch that this rank's module reads.

        Args:
            micro_batch_size: samples in a microbatch over all ranks.
            module_name: the module; may be left out where only one lives on this rank.

        Raises:
            ValueError: the module is not on this rank, or the microbatch does not divide by its DP.
            RuntimeError: several modules live on this rank and none is named.

        Example:
            >>> images = torch.zeros(8, 3)
            >>> images[coordinator.data_parallel_slice(8, "vision")].shape
            torch.Size([8, 3])
        """
        if module_name is None:
            module_name = self._only_module("data_parallel_slice", "the module_name argument").name
        if module_name not in self._grids:
            raise ValueError(
                f"there is no module {module_name!r}; the modules are {', '.join(self._grids)}"
            )
        return data_parallel_slice(micro_batch_size, self._grids[module_name], self._rank)

    def validate_data_loader_contract(
        self, global_batch_size: int, micro_batch_size: int, num_microbatches: int
    ) -> None:
        """:func:`megatron_mimo_coord.validate_data_loader_contract` for this layout."""
        infrastructure.validate_data_loader_contract(
            self._infra, global_batch_size, micro_batch_size, num_microbatches
        )

    def reduce_losses(self, losses: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average what the schedule returned, to the same map on every rank. Collective.

        Args:
            losses: the schedule's return value: a map a microbatch on the last stage, empty
                elsewhere. A value is a number, averaged over microbatches and replicas, or a pair
                (sum, weight), of which sum of sums / sum of weights is reported.

        Raises:
            ValueError: a value is neither a number nor a pair; on every rank.

        Example:
            >>> coordinator.reduce_losses([{"loss": (6.0, 2.0)}, {"loss": (6.0, 4.0)}])
            {'loss': 2.0}
        """
        last_stage = self._grids[LANGUAGE].dim("pp") - 1
        return reduce_losses(
            losses,
            group=self._language_group() if self._is_on_last_stage() else None,
            source=self._grids[LANGUAGE].rank_at(pp=last_stage),
        )

    def grad_norms(self) -> dict[str, torch.Tensor]:
        """L2 norm of each module's gradients, the same on every rank. Collective.

        Call it between the schedule and ``optimizer.step()``, which clips. One sum over the world
        of one number a module; nothing waits for the device until a norm is read.

        Returns:
            For each module of the job, a tensor without dims on this rank's device, in fp32. The
            loss scale is taken out.

        Example:
            >>> norms = coordinator.grad_norms()
            >>> {name: float(norm) for name, norm in norms.items()}
            {'vision': 0.0, 'language': 0.0}
        """
        scale = torch.ones((), device=self._device)
        scale_loss = self._hooks.get("grad_scale_func")
        return self._shares.norms(scale if scale_loss is None else scale_loss(scale))

    def num_trainable_parameters(self) -> dict[str, int]:
        """Parameters of each module that have a gradient, over all ranks, each counted once.

        Collective, the same on every rank; ask once, outside the loop.

        Example:
            >>> list(coordinator.num_trainable_parameters())
            ['vision', 'language']
        """
        return self._shares.counts()

    @cached_property
    def _shares(self) -> GradientShares:
        return GradientShares(
            list(self._grids),
            {module.name: (module.ddp, module.pg_collection) for module in self._modules},
            self._device,
        )

    def describe(self, micro_batch_size: int | None = None) -> str:
        """The layout as text, the same on every rank: print it before the first step.

        Args:
            micro_batch_size: samples in a microbatch over all ranks; shown as shares if left out.
        """
        return describe(
            summarize(
                self._grids,
                self._factors,
                per_token=self._per_token,
                micro_batch_size=micro_batch_size,
            )
        )

    # -- what the schedule calls -------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the microbatches inside only accumulate; the schedule's ``no_sync_func``."""
        if torch.is_grad_enabled():  # else it evaluates, and there will be nothing to finalize
            self._finalized = None
        for module in self._modules:
            module.reduction.begin()
        with ExitStack() as stack:
            for ddp in self._ddps:
                stack.enter_context(ddp.no_sync())
            yield

    def start_grad_sync(self, *params: Any) -> None:
        """Launch the overlapped reductions; the schedule's ``grad_sync_func``.

        Args:
            *params: the model's parameters, which the schedule passes; all are reduced.
        """
        for module in self._modules:
            module.reduction.launch()

    def start_param_sync(self, *params: Any) -> None:
        """Launch the overlapped gathering of parameters; the schedule's ``param_sync_func``.

        Args:
            *params: the model's parameters, which the schedule passes; all are gathered.
        """
        for module in self._modules:
            module.reduction.gather_params()

    def finalize_model_grads(
        self,
        model: Any = None,
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = None,
    ) -> None:
        """Make every module's gradients those of the one loss; ``finalize_model_grads_func``.

        Each module is reduced over its own groups by Megatron's own ``finalize_model_grads``. With
        a per-token loss the number of tokens is summed meanwhile, in one collective of one number,
        and divides the gradients at the end. No module waits for another's reduction, and nothing
        waits for the device.

        Args:
            model: what the schedule passes; the coordinator's own modules are finalized.
            num_tokens: unmasked tokens that this rank counted, a tensor with one element. Only the
                count of the language model's last stage is used.
            pg_collection: what the schedule passes; each module's own groups are used.
            force_all_reduce: with the distributed optimizer, have every rank end with all
                gradients, and not only with its shards.

        Raises:
            ValueError: ``num_tokens`` is missing and the loss is per token, or the reverse.
            RuntimeError: called twice in a step, or outside of one.
        """
        self._refuse_outside_a_step()
        force = bool(force_all_reduce)
        with named_range("finalize_model_grads"):
            counting = self._start_counting(num_tokens)
            for module in self._modules:
                with named_range(module.name), self._lend_timers(module):
                    module.reduction.launch()
                    finalize_model_grads(
                        [module.ddp],
                        num_tokens=None,
                        pg_collection=module.groups_to_finalize,
                        force_all_reduce=force,
                    )
            inverse_tokens = None
            if counting is not None:
                counting.wait()
                inverse_tokens = self._tokens.clamp(min=1).reciprocal()
            for module in self._modules:
                module.normalizer.apply(inverse_tokens, module.reduction.reduces_everything(force))
                module.reduction.end(force)
        self._finalized = self._versions()

    def _versions(self) -> list[int]:
        """PyTorch's count of the writes to each gradient buffer: backward's, zeroing, scaling."""
        return [grads._version for grads in self._grads]

    def _refuse_outside_a_step(self) -> None:
        """No gradient came since the last time, and the schedule has not begun another step."""
        if self._finalized == self._versions():
            raise RuntimeError(
                "finalize_model_grads was called outside a step, or a second time in one step, "
                "which would reduce the gradients twice: call it once after the last backward, and "
                "zero_grad_buffer() before the next step (the schedule calls it; do not call it "
                "yourself as well)"
            )

    @contextmanager
    def _lend_timers(self, module: _Module) -> Iterator[None]:
        """Have Megatron time a module with the timers of the config that was attached.

        Where timers start with a barrier, each rank must meet it as often as the others, however
        many modules it holds: those of the first one count.
        """
        lender, borrower = self._config, module.ddp.config
        if lender is None or lender.timers is None:
            yield
            return
        before = borrower.timers, borrower.barrier_with_L1_time
        borrower.timers = lender.timers
        is_first = module is self._modules[0]
        borrower.barrier_with_L1_time = lender.barrier_with_L1_time and is_first
        try:
            yield
        finally:
            borrower.timers, borrower.barrier_with_L1_time = before

    def _start_counting(self, num_tokens: torch.Tensor | None) -> dist.Work | None:
        """Launch the sum of the token counts over the ranks that hold distinct ones."""
        missing = self._needs_tokens and num_tokens is None
        if missing or (num_tokens is not None and not self._per_token):
            raise ValueError(
                f"the language model's calculate_per_token_loss is {self._per_token}, but "
                f"num_tokens is {'missing' if num_tokens is None else 'given'}: pass num_tokens "
                f"just when the loss is per token (the schedule does so by itself)"
            )
        if not self._per_token:
            return None
        if self._counts_tokens and num_tokens is not None:
            self._tokens.copy_(num_tokens.reshape(()))
        else:
            self._tokens.zero_()
        return dist.all_reduce(self._tokens, async_op=True)

    # -- construction ------------------------------------------------------------------------------

    def _read(self, infra: Infra | GridsAndGroups, model: torch.nn.Module) -> RankFacts:
        """Look at what this rank was given; what there is to say about it to the other ranks."""
        self._infra = as_infra(infra)
        self._model = unwrap_mimo_model(model)
        grid_map, topology = self._infra.module_to_grid_map, self._infra.topology
        self._grids = {name: ModuleGrid.of(name, grid) for name, grid in grid_map.items()}
        self._per_token = bool(self._model.config.calculate_per_token_loss)
        problems: list[str] = [*layout_problems(self._grids, topology, dist.get_world_size())]
        ddps = {}
        for name in self._names_here:
            problems += module_problems_here(self._model, self._infra, self._grids[name])
            ddp = find_ddp(self._model, name)
            if ddp is not None:
                ddps[name] = ddp
        names = sorted(self._grids)
        return RankFacts(
            job={
                "megatron-core version": megatron_version,
                "the modules": ", ".join(self._grids),
                "topology": str(dict(topology) if isinstance(topology, Mapping) else topology),
                "calculate_per_token_loss of the language model": str(self._per_token),
                **{f"module {name}": str(grid) for name, grid in self._grids.items()},
            },
            modules={name: facts(ddp) for name, ddp in ddps.items()},
            problems=problems,
            flags=sum(1 << names.index(name) for name, ddp in ddps.items() if sums(ddp)),
        )

    def _factors_of(self, flags: list[int]) -> dict[str, float]:
        """Each module's factor; the flags of the ranks tell how the DDPs there deliver."""
        names = sorted(self._grids)
        return {
            name: gradient_scaling_factor(
                grid.replicas,
                self._grids[LANGUAGE].replicas,
                ddp_sums=bool(flags[grid.rank_offset] >> names.index(name) & 1),
                per_token=self._per_token,
            )
            for name, grid in self._grids.items()
        }

    @property
    def _names_here(self) -> list[str]:
        return [name for name, grid in self._grids.items() if self._rank in grid.ranks]

    def _collect(self, name: str) -> _Module:
        ddp = find_ddp(self._model, name)
        pg_collection = self._infra.pg_collections[name]
        assert ddp is not None and pg_collection is not None, "module_problems_here has seen to it"
        normalizer = GradientNormalizer(
            ddp,
            replicas=self._grids[name].replicas,
            language_replicas=self._grids[LANGUAGE].replicas,
            per_token=self._per_token,
        )
        if not normalizer.fast and self._rank == self._grids[name].rank_offset:
            logger.warning(
                "module %s: this Megatron-Core does not scale its gradient buckets as 0.19 does; "
                "its gradients are scaled in a pass of their own after the reduction",
                name,
            )
        return _Module(
            name=name,
            ddp=ddp,
            grid=self._infra.module_to_grid_map[name],
            pg_collection=pg_collection,
            groups_to_finalize=_groups_to_finalize(name, pg_collection),
            reduction=OrderedReduction.of(ddp),
            normalizer=normalizer,
        )

    def _collect_for_schedule(self) -> MultiModuleProcessGroupCollection:
        here = {module.name: module.pg_collection for module in self._modules}
        collection = MultiModuleProcessGroupCollection(
            module_pgs=here, language_model_module_name=LANGUAGE if LANGUAGE in here else None
        )
        if LANGUAGE in here:  # forward_backward_no_pipelining looks for these two
            collection.tp = here[LANGUAGE].tp
            collection.cp = here[LANGUAGE].cp
        return collection

    def _hooks_for(self, optimizer: Any) -> dict[str, Any]:
        configs = [ddp.ddp_config for ddp in self._ddps]
        hooks: dict[str, Any] = {
            "no_sync_func": self.no_sync,
            "finalize_model_grads_func": self.finalize_model_grads,
        }
        if optimizer is not None:
            hooks["grad_scale_func"] = optimizer.scale_loss
        if any(config.overlap_grad_reduce for config in configs):
            hooks["grad_sync_func"] = self.start_grad_sync
        if any(config.overlap_param_gather and config.align_param_gather for config in configs):
            hooks["param_sync_func"] = self.start_param_sync
        return hooks

    def _only_module(self, asked: str, plural: str) -> _Module:
        if len(self._modules) != 1:
            raise RuntimeError(
                f"{asked} is the only module's, but rank {self._rank} holds several: "
                f"{', '.join(self._names_here)}; use {plural}"
            )
        return self._modules[0]

    def _is_on_last_stage(self) -> bool:
        grid = self._grids[LANGUAGE]
        return self._rank in grid.ranks and (
            grid.coordinate(self._rank, "pp") == grid.dim("pp") - 1
        )

    def _is_token_counter(self) -> bool:
        """Ranks that differ in more than DP and CP hold the same count: one speaks for all."""
        grid = self._grids[LANGUAGE]
        return self._is_on_last_stage() and all(
            grid.coordinate(self._rank, dim) == 0
            for dim in grid.dim_names
            if dim not in ("dp", "cp", "pp")
        )

    def _language_group(self) -> dist.ProcessGroup:
        return next(module.ddp.dp_cp_group for module in self._modules if module.name == LANGUAGE)


def _groups_to_finalize(name: str, groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """Encoders tie no word embeddings, but Megatron looks for them wherever there is a group."""
    if name != LANGUAGE:
        groups = copy(groups)
        groups.embd = groups.pos_embd = None
    return groups
