"""The one object that a MIMO trainer holds, and whose methods the Megatron schedule calls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core import __version__ as megatron_version
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)

from megatron_mimo_coord import infra as infrastructure
from megatron_mimo_coord.agreement import Statement, agree, world_device
from megatron_mimo_coord.batch import data_parallel_slice
from megatron_mimo_coord.colocated import (
    let_token_counts_vary as let_colocated_token_counts_vary,
)
from megatron_mimo_coord.communicator import (
    TokenCounts,
    VaryingTokensCommunicator,
    fan_in_encoders,
)
from megatron_mimo_coord.description import describe, summarize
from megatron_mimo_coord.infra import Infra, default_output_ndim
from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    gradient_scaling_factor,
    is_colocated,
)
from megatron_mimo_coord.losses import reduce_losses
from megatron_mimo_coord.normalization import (
    GradientNormalizer,
    grad_buffers,
    owns_its_gradients,
)
from megatron_mimo_coord.problems import layout_problems
from megatron_mimo_coord.reduction import OrderedReduction


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
            ``topology``.
        model: the ``MimoModel``, its submodules wrapped in Megatron's ``DistributedDataParallel``;
            ``Float16Module`` may be around it, around its submodules, or both.

    Raises:
        ValueError: the layout cannot run, the model lacks a module or its DDP, or ranks disagree;
            raised on every rank alike, with every problem found.
        RuntimeError: ``model`` holds no ``MimoModel``.
    """

    def __init__(self, infra: Infra, model: torch.nn.Module) -> None:
        self._infra = infra
        self._model = unwrap_mimo_model(model)
        self._rank = dist.get_rank()
        self._grids = {
            name: ModuleGrid.of(name, grid) for name, grid in infra.module_to_grid_map.items()
        }
        self._per_token = bool(self._model.config.calculate_per_token_loss)
        self._device = world_device()
        self._factors = self._agree_on_factors()
        self._modules = tuple(self._collect(name) for name in self._names_here)
        self._ddps = tuple(module.ddp for module in self._modules)
        self._module_to_grid_tuples = tuple((module.ddp, module.grid) for module in self._modules)
        self._schedule_pg_collection = self._collect_for_schedule()
        self._token_counts = TokenCounts.of(
            self._model, fan_in_encoders(self._grids, infra.topology)
        )
        self._hooks: dict[str, Any] = {}
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._device)
        self._counts_tokens = self._is_token_counter()
        self._needs_tokens = self._per_token and self._rank in self._grids[LANGUAGE].ranks
        self._grads = [buffer.grad_data for ddp in self._ddps for buffer in grad_buffers(ddp)]
        self._finalized: list[int] | None = None

    # -- what lives on this rank -------------------------------------------------------------------

    @property
    def module_to_grid_tuples(self) -> tuple[tuple[DistributedDataParallel, HyperCommGrid], ...]:
        """(module, grid) of every module on this rank; the module is its DDP."""
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
            optimizer: Megatron's optimizer, whose ``scale_loss`` scales the loss.

        Raises:
            ValueError: someone else has set one of these hooks, or the modules are on disjoint
                ranks and ``variable_seq_lengths`` is off. Nothing is set then.
        """
        if not config.variable_seq_lengths and not is_colocated(self._grids.values()):
            raise ValueError(
                "modules on disjoint ranks exchange tensors whose shapes vary, but "
                "config.variable_seq_lengths is False: set it to True (a mixture-of-experts model "
                'then needs moe_token_dispatcher_type="alltoall")'
            )
        hooks = self._hooks_for(optimizer)
        owners = [getattr(getattr(config, name), "__self__", None) for name in hooks]
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
        for name, hook in hooks.items():
            setattr(config, name, hook)
        self._hooks |= hooks

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
            >>> images = batch["images"][coordinator.data_parallel_slice(32)]  # doctest: +SKIP
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
        """
        last_stage = self._grids[LANGUAGE].dim("pp") - 1
        return reduce_losses(
            losses,
            group=self._language_group() if self._is_on_last_stage() else None,
            source=self._grids[LANGUAGE].rank_at(pp=last_stage),
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
            RuntimeError: called twice in a step.
        """
        self._refuse_second_time()
        force = bool(force_all_reduce)
        counting = self._start_counting(num_tokens)
        for module in self._modules:
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

    def _refuse_second_time(self) -> None:
        if self._grads and self._finalized == self._versions():
            raise RuntimeError(
                "finalize_model_grads was called a second time in one step, which would reduce the "
                "gradients twice: call it once after the last backward, and zero_grad_buffer() "
                "before the next step (the schedule calls it; do not call it yourself as well)"
            )

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

    def _agree_on_factors(self) -> dict[str, float]:
        """Compare notes with all ranks, and learn how the DDPs of other ranks deliver."""
        names = sorted(self._grids)
        ddps = {name: _find_ddp(self._submodule(name)) for name in self._names_here}
        problems = [
            *layout_problems(self._grids, self._infra.topology, dist.get_world_size()),
            *(problem for name, ddp in ddps.items() for problem in self._problems(name, ddp)),
        ]
        found = {name: ddp for name, ddp in ddps.items() if ddp is not None}
        statement = Statement(
            job={
                "megatron-core version": megatron_version,
                "modules": ", ".join(str(self._grids[name]) for name in self._grids),
                "topology": str({name: list(to) for name, to in self._infra.topology.items()}),
                "calculate_per_token_loss of the language model": str(self._per_token),
            },
            modules={name: _facts(ddp) for name, ddp in found.items()},
            problems=problems,
            flags=sum(1 << names.index(name) for name, ddp in found.items() if _sums(ddp)),
        )
        flags = agree(statement)
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

    def _submodule(self, name: str) -> torch.nn.Module | None:
        if name == LANGUAGE:
            return self._model.language_model
        return dict(self._model.modality_submodules.items()).get(name)

    def _problems(self, name: str, ddp: DistributedDataParallel | None) -> list[str]:
        """What keeps a module on this rank from being coordinated."""
        if self._submodule(name) is None:
            return [
                f"infra places module {name!r} on this rank, but the model has no such module "
                f"here: give MimoModelConfig the same module_to_grid_map and a spec for {name!r}"
            ]
        if ddp is None:
            return [
                f"module {name!r} is not wrapped in megatron.core.distributed."
                f"DistributedDataParallel: wrap each submodule of the MimoModel, frozen ones too"
            ]
        if self._infra.pg_collections.get(name) is None:
            return [
                f"infra has no process groups for module {name!r} on a rank of its grid: fill "
                f"pg_collections[{name!r}] there"
            ]
        problems = []
        replicas = self._grids[name].replicas
        if ddp.dp_cp_group.size() != replicas:
            problems.append(
                f"module {name!r} is reduced over {ddp.dp_cp_group.size()} ranks by its DDP, but "
                f"its grid has DP x CP = {replicas}: pass pg_collections[{name!r}] to the DDP"
            )
        if not owns_its_gradients(ddp):
            problems.append(
                f"the gradients of module {name!r} go to the buffers of another DDP: wrap its "
                f"parameters once, in the DDP of the submodule and not around the MimoModel as well"
            )
        if name == LANGUAGE and _sums(ddp) != self._per_token:
            problems.append(
                f"the language model's DDP was built with calculate_per_token_loss={_sums(ddp)}, "
                f"but the MimoModel's config says {self._per_token}: use one config for both"
            )
        return problems

    def _collect(self, name: str) -> _Module:
        ddp = _find_ddp(self._submodule(name))
        pg_collection = self._infra.pg_collections[name]
        assert ddp is not None and pg_collection is not None, "checked by _problems"
        return _Module(
            name=name,
            ddp=ddp,
            grid=self._infra.module_to_grid_map[name],
            pg_collection=pg_collection,
            groups_to_finalize=_groups_to_finalize(name, pg_collection),
            reduction=OrderedReduction.of(ddp),
            normalizer=GradientNormalizer(
                name,
                ddp,
                replicas=self._grids[name].replicas,
                language_replicas=self._grids[LANGUAGE].replicas,
                per_token=self._per_token,
            ),
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


def unwrap_mimo_model(model: torch.nn.Module) -> MimoModel:
    """The ``MimoModel`` inside ``Float16Module`` and ``DistributedDataParallel``.

    Args:
        model: a ``MimoModel``, or a chain of wrappers with ``.module`` around one.

    Raises:
        RuntimeError: there is no ``MimoModel`` inside.
    """
    inner: Any = model
    while not isinstance(inner, MimoModel):
        if not isinstance(getattr(inner, "module", None), torch.nn.Module):
            raise RuntimeError(
                f"there is no MimoModel inside {type(model).__name__}; pass the MimoModel itself, "
                f"or a Float16Module or DistributedDataParallel around it"
            )
        inner = inner.module
    return inner


def _find_ddp(module: Any) -> DistributedDataParallel | None:
    """The DDP in a chain of wrappers."""
    while module is not None and not isinstance(module, DistributedDataParallel):
        module = getattr(module, "module", None)
    return module


def _groups_to_finalize(name: str, groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """Encoders tie no word embeddings, but Megatron looks for them wherever there is a group."""
    if name != LANGUAGE:
        groups = copy(groups)
        groups.embd = groups.pos_embd = None
    return groups


def _sums(ddp: DistributedDataParallel) -> bool:
    """Whether a DDP delivers the sum over its replicas; else it delivers the mean."""
    return bool(ddp.config.calculate_per_token_loss)


def _facts(ddp: DistributedDataParallel) -> dict[str, str]:
    """Settings of a module that its ranks must share, or their collectives do not match."""
    settings = (
        "overlap_grad_reduce",
        "use_distributed_optimizer",
        "num_distributed_optimizer_instances",
        "grad_reduce_in_fp32",
        "average_in_collective",
        "bucket_size",
    )
    facts = {name: str(getattr(ddp.ddp_config, name)) for name in settings}
    return {"calculate_per_token_loss": str(_sums(ddp)), **facts}
