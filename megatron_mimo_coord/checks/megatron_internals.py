"""Names in Megatron-Core that this package relies on and that Megatron does not promise to keep.

One table: what, which file of this package uses it, and what does not work without it. A
coordinator looks for every entry before it reads anything by these names, and tells of those that
are missing in one sentence each. Two tests hold the table to the package: each file uses what its
rows say, and no other name of the table's classes. To move to another Megatron-Core, run them, and
change the files that they name.

Names are looked up in the class or module. The objects that exist when a coordinator is built, a
module's DDP and its parts, are looked at themselves. Of other attributes that a class only sets
when it runs, the name must occur in its code, which is no proof that it is set. Nor does a row say
that a name still means the same: that is for the tests of the files that use it.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from attrs import field, frozen
from megatron.core import __version__ as megatron_version
from megatron.core.distributed import DistributedDataParallel

_CPU_RANKS = "megatron_mimo_coord.cpu.ranks"
"""Imported where ranks run on CPUs; the rows of ``cpu/`` matter only there."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@frozen
class Internal:
    """Names of one class or module of Megatron-Core that one file of this package uses.

    Args:
        owner: dotted path of the class or module that has the names.
        names: the attributes; ``.name`` is one that the class only sets when it runs, on its
            objects or on tensors; ``name(parameter)`` is a method that takes this parameter.
        used_by: file of this package.
        affects: what does not work where they are missing.
        found_on: the objects of a module's DDP that carry the names, where they can be looked at.
        fallback: what happens instead where this package can do without; else construction fails.
    """

    owner: str
    names: tuple[str, ...] = field(converter=_words)
    used_by: str
    affects: str
    found_on: Callable[[DistributedDataParallel], Iterable[Any]] | None = None
    fallback: str = ""

    def missing(self, ddps: Iterable[DistributedDataParallel] = ()) -> list[str]:
        """Names that the installed Megatron-Core does not have.

        Args:
            ddps: the modules on this rank, where names are carried by their parts.
        """
        if self.found_on is None:
            owners = [_resolve(self.owner)]
        else:
            owners = [part for ddp in ddps for part in self.found_on(ddp)]
        return [name for name in self.names if not all(_has(owner, name) for owner in owners)]

    def sentence(self, missing: Iterable[str]) -> str:
        """What is missing, what of this package is affected, and what to do."""
        instead = self.fallback or "use megatron-core 0.19, or the release of this package for it"
        names = ", ".join(name.lstrip(".") for name in missing)
        return (
            f"megatron-core {megatron_version}: {self.owner} has no {names}, which "
            f"megatron_mimo_coord/{self.used_by} relies on for {self.affects}; {instead}"
        )

    @property
    def is_needed(self) -> bool:
        """Whether a coordinator in this process cannot do without."""
        for_cpu_ranks = self.used_by.startswith("cpu/")
        return not self.fallback and (not for_cpu_ranks or _CPU_RANKS in sys.modules)

    @property
    def plain_names(self) -> tuple[str, ...]:
        """The names as Python code has them."""
        return tuple(name.lstrip(".").partition("(")[0] for name in self.names)


def internals_problems(ddps: Iterable[DistributedDataParallel]) -> list[str]:
    """A sentence for each entry of the table that the installed Megatron-Core lacks."""
    ddps = list(ddps)
    return [
        internal.sentence(missing)
        for internal in INTERNALS
        if internal.is_needed and (missing := internal.missing(ddps))
    ]


def _resolve(path: str) -> Any:
    """The module or class at a dotted path, None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        parent = import_module(module)
        return getattr(parent, name) if hasattr(parent, name) else import_module(path)
    except ModuleNotFoundError:
        return None


def _takes(function: Any, parameter: str) -> bool:
    """Whether a function has a parameter, or passes on whatever it is given."""
    parameters = inspect.signature(function).parameters
    return parameter in parameters or any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
    )


def _has(owner: Any, name: str) -> bool:
    """Whether a module, a class or an object has what a row writes as ``name``."""
    name, _, parameter = name.rstrip(")").partition("(")
    if name.startswith("."):
        return hasattr(owner, name[1:]) or _sets(owner, name[1:])
    if isinstance(owner, torch.nn.Module) and hasattr(torch.nn.Module, name):
        return name in vars(owner)  # DDP has a list, and every module a method, called buffers
    if not hasattr(owner, name):
        return False
    value = getattr(owner, name)
    if parameter and not _takes(value, parameter):
        return False
    # What a base class only asks for is not there.
    return not getattr(value, "__isabstractmethod__", False) or name in vars(owner)


def _sets(owner: Any, name: str) -> bool:
    """Whether the code of a class of Megatron's has an attribute of this name."""
    return any(
        inspect.isfunction(method) and name in method.__code__.co_names
        for each in getattr(owner, "__mro__", ())
        if not each.__module__.startswith("torch.")
        for method in vars(each).values()
    )


# -- the parts of a DDP; one that is missing has no parts, and a row of its own --------------------


def _parts(owner: Any, *names: str) -> Iterator[Any]:
    for name in names:
        found = getattr(owner, name, ())
        yield from found if isinstance(found, Iterable) else ()


def _ddp(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield ddp


def _first_param(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield from islice(_parts(ddp, "params_with_grad"), 1)  # there are thousands, all treated alike


def _buffers(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield from _parts(ddp, "buffers", "expert_parallel_buffers")


def _bucket_groups(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield from _parts(ddp, "bucket_groups", "expert_parallel_bucket_groups")


def _sharded_bucket_groups(ddp: DistributedDataParallel) -> Iterator[Any]:
    if getattr(getattr(ddp, "ddp_config", None), "use_distributed_optimizer", False):
        yield from _bucket_groups(ddp)


def _buckets(ddp: DistributedDataParallel) -> Iterator[Any]:
    for group in _bucket_groups(ddp):
        yield from _parts(group, "buckets")


_DDP = "megatron.core.distributed.DistributedDataParallel"
_GRAD_BUFFER = "megatron.core.distributed.param_and_grad_buffer"
_BUFFER = f"{_GRAD_BUFFER}._ParamAndGradBuffer"
_BUCKET = f"{_GRAD_BUFFER}._ParamAndGradBucket"
_BUCKET_GROUP = f"{_GRAD_BUFFER}._ParamAndGradBucketGroup"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_PIPELINE = "megatron.core.pipeline_parallel"
_MIMO = "megatron.core.models.mimo"
_RANDOM = "megatron.core.tensor_parallel.random"

_FINITE = "gradients/finite_steps.py"
_STATE = "training/checkpoint_states.py"
_TIMELINE = "metrics/timeline_recording.py"
_CPU = "cpu/cuda_means_cpu.py"

INTERNALS = (
    # -- gradients: DDP, its buffers, buckets and bucket groups
    Internal(
        _DDP,
        "dp_cp_group config ddp_config",
        "checks/modules.py",
        "comparing a module's DDP with its grid and its settings",
        _ddp,
    ),
    Internal(
        _DDP,
        "buffers expert_parallel_buffers bucket_groups expert_parallel_bucket_groups dp_cp_group "
        "expt_dp_group params_with_grad",
        "gradients/buckets.py",
        "reading how gradients are laid out",
        _ddp,
    ),
    Internal(
        _DDP,
        "bucket_groups expert_parallel_bucket_groups force_all_reduce",
        "gradients/launch_order.py",
        "the order in which reductions are launched",
        _ddp,
    ),
    Internal(
        _DDP,
        "remove_forward_pre_hook_handles start_param_sync(force_sync)",
        "gradients/param_gather.py",
        "the order in which parameters are gathered",
        _ddp,
    ),
    Internal(
        _DDP,
        "dp_cp_group expt_dp_group scale_gradients",
        "gradients/scaling.py",
        "scaling gradients",
        _ddp,
    ),
    Internal(
        _DDP,
        "params_with_grad",
        "gradients/finalize.py",
        "setting gradients to zero",
        _ddp,
    ),
    Internal(
        _BUFFER,
        "main_grad",
        "gradients/buckets.py",
        "telling whether a parameter's gradient is in the buffers of its module",
        _first_param,
    ),
    Internal(
        _BUFFER,
        "grad_data extra_main_grads",
        "gradients/buckets.py",
        "reading how gradients are laid out",
        _buffers,
    ),
    Internal(
        _BUFFER,
        "grad_data extra_main_grads",
        "gradients/scaling.py",
        "scaling gradients, also those that are accumulated beside their buffer",
        _buffers,
    ),
    Internal(
        _BUFFER,
        "grad_data",
        "gradients/step_state.py",
        "telling whether backward has run since gradients were finalized",
        _buffers,
    ),
    Internal(
        _BUCKET,
        "gradient_scaling_factor",
        "gradients/scaling.py",
        "scaling gradients in DDP's own pass",
        _buckets,
        fallback="they are scaled in a pass of their own after the reduction",
    ),
    Internal(
        _BUCKET,
        "grad_data params_list param_to_index",
        "gradients/buckets.py",
        "the norms of gradients",
        _buckets,
    ),
    Internal(
        _BUCKET,
        "grad_data",
        "gradients/launch_order.py",
        "gathering reduced gradients (force_all_reduce)",
        _buckets,
    ),
    Internal(
        _BUCKET_GROUP,
        "buckets",
        "gradients/buckets.py",
        "reading how gradients are laid out",
        _bucket_groups,
    ),
    Internal(
        _BUCKET_GROUP,
        "intra_distributed_optimizer_instance_group",
        "gradients/buckets.py",
        "finding this rank's shard of a gradient",
        _sharded_bucket_groups,
    ),
    Internal(
        _BUCKET_GROUP,
        ".inter_distributed_optimizer_instance_group",
        "gradients/buckets.py",
        "finding this rank's part of a gradient where distributed optimizers have copies",
    ),
    Internal(
        _BUCKET_GROUP,
        "params buckets grad_reduce_handle is_first_batch per_param_grad_ready_counts",
        "gradients/launch_order.py",
        "the order in which reductions are launched",
        _bucket_groups,
    ),
    Internal(
        _BUCKET_GROUP,
        "start_grad_sync(force_all_reduce) reset",
        "gradients/launch_order.py",
        "the order in which reductions are launched",
    ),
    Internal(
        _BUCKET_GROUP,
        "intra_distributed_optimizer_instance_group intra_distributed_optimizer_instance_rank "
        "intra_distributed_optimizer_instance_size",
        "gradients/launch_order.py",
        "gathering reduced gradients (force_all_reduce)",
        _sharded_bucket_groups,
    ),
    Internal(
        _BUCKET_GROUP,
        "param_gather_handle param_gather_dispatched next_param_gather_bucket_group",
        "gradients/param_gather.py",
        "the order in which parameters are gathered",
        _bucket_groups,
    ),
    Internal(
        _BUCKET_GROUP,
        "start_param_sync finish_param_sync(skip_next_bucket_dispatch)",
        "gradients/param_gather.py",
        "the order in which parameters are gathered",
    ),
    # -- gradients: optimizers
    Internal(
        f"{_MIMO}.optimizer.MimoOptimizer",
        ".module_infos prepare_grads get_grad_norm",
        _FINITE,
        "skipping steps that are not finite",
    ),
    Internal(
        f"{_MIMO}.optimizer.ModuleOptimizerInfo",
        ".optimizer .is_active",
        _FINITE,
        "skipping steps that are not finite",
    ),
    Internal(
        f"{_OPTIMIZER}.MegatronOptimizer",
        "prepare_grads get_grad_norm get_grads_for_grad_norm get_grad_stats_parallel_group "
        "get_parameters",
        _FINITE,
        "skipping steps that are not finite",
    ),
    Internal(
        f"{_OPTIMIZER}.ChainedOptimizer",
        ".chained_optimizers",
        _FINITE,
        "skipping steps that are not finite, where a module has experts",
    ),
    Internal(
        f"{_OPTIMIZER}.MixedPrecisionOptimizer",
        ".grad_scaler",
        _FINITE,
        "one loss scale for all modules with fp16",
    ),
    Internal(
        "megatron.core.optimizer.grad_scaler.DynamicGradScaler",
        "update",
        _FINITE,
        "one loss scale for all modules with fp16",
    ),
    Internal(
        _DISTRIBUTED_OPTIMIZER,
        ".decoupled_grad",
        _FINITE,
        "finding gradients that are not finite with use_precision_aware_optimizer",
    ),
    Internal(
        f"{_OPTIMIZER}.MegatronOptimizer",
        "scale_loss",
        "training/schedule_hooks.py",
        "the loss scale of fp16",
    ),
    # -- bridges
    Internal(
        f"{_MIMO}.MimoModel",
        "_attach_modality_split_sizes _has_encoder_tokens .role .special_token_ids",
        "bridges/token_counts.py",
        "samples with different numbers of tokens",
    ),
    Internal(
        f"{_MIMO}.MimoModel",
        "._mimo_bridge_split_sizes",
        "bridges/outgoing.py",
        "sending an encoder's output to several ranks",
    ),
    Internal(
        f"{_MIMO}.MimoModel",
        "_apply_colocated_comms _empty_encoder_output .colocated_comms .mimo_config "
        ".special_token_ids",
        "bridges/colocated.py",
        "activations between modules on the same ranks",
    ),
    Internal(
        f"{_MIMO}.comm.colocated_communicator.ColocatedBridgeCommunicator",
        ".gather_pg .gather_group_ranks .rank_to_src_pos .rank_to_dest_pos .dest_dp_size is_fan_in "
        "is_fan_out",
        "bridges/colocated.py",
        "activations between modules on the same ranks",
    ),
    Internal(
        f"{_PIPELINE}.multimodule_communicator.MultiModulePipelineCommunicator",
        "_build_bridge_comms current_stage total_stages .current_rank .rank_module_map .config "
        ".topology .module_to_grid_map .module_output_ndim",
        "bridges/communicator.py",
        "activations between modules on disjoint ranks",
    ),
    Internal(
        f"{_PIPELINE}.multimodule_communicator.RankModuleInfo",
        ".pp_rank",
        "bridges/communicator.py",
        "activations between modules on disjoint ranks",
    ),
    Internal(
        f"{_PIPELINE}.bridge_communicator.BridgeCommunicator",
        "destroy_broadcast_pgs destroy_bridge_pgs",
        "infra.py",
        "giving the groups of bridges back",
    ),
    # -- what layers look up
    Internal(
        "megatron.core.parallel_state",
        "_GLOBAL_MEMORY_BUFFER _set_global_memory_buffer",
        "world/global_state.py",
        "the buffer that tensor-parallel layers gather into",
    ),
    Internal(
        f"{_RANDOM}.CudaRNGStatesTracker",
        "is_initialized",
        "world/global_state.py",
        "the random states that layers draw from",
    ),
    # -- checkpoints and timelines
    Internal(
        "megatron.core.parallel_state",
        "model_parallel_is_initialized set_data_parallel_rank",
        _STATE,
        "checkpoints of a model with tied embeddings",
    ),
    Internal(
        f"{_MIMO}.optimizer.MimoOptimizer",
        ".module_infos",
        _STATE,
        "checkpoints of the optimizer",
    ),
    Internal(
        f"{_MIMO}.optimizer.ModuleOptimizerInfo",
        ".optimizer .is_active",
        _STATE,
        "checkpoints of the optimizer",
    ),
    Internal(
        f"{_OPTIMIZER}.MegatronOptimizer",
        ".optimizer .config .init_state_fn",
        _STATE,
        "checkpoints of the optimizer",
    ),
    Internal(
        f"{_OPTIMIZER}.ChainedOptimizer",
        ".chained_optimizers",
        _STATE,
        "checkpoints of the optimizer of a module with experts",
    ),
    Internal(
        f"{_OPTIMIZER}.FP32Optimizer",
        ".is_stub_optimizer",
        _STATE,
        "checkpoints of the optimizer of a rank without parameters",
    ),
    Internal(
        f"{_OPTIMIZER}.MixedPrecisionOptimizer",
        ".grad_scaler",
        _STATE,
        "the loss scale of fp16 in checkpoints",
    ),
    Internal(
        f"{_OPTIMIZER}.Float16OptimizerWithFloat16Params",
        ".main_param",
        _STATE,
        "the fp32 weights of bf16 and fp16 in checkpoints",
    ),
    Internal(
        _DISTRIBUTED_OPTIMIZER,
        ".model_param_group_index_map _get_model_param_range_map "
        "_get_main_param_and_optimizer_states _set_main_param_and_optimizer_states",
        _STATE,
        "checkpoints of the distributed optimizer, without gathering it",
    ),
    Internal(
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer.HybridDeviceOptimizer",
        "sub_optimizers",
        _STATE,
        "refusing to save an optimizer with optimizer_cpu_offload",
    ),
    Internal(
        f"{_OPTIMIZER}.MegatronOptimizer",
        "reload_model_params",
        "training/checkpoints.py",
        "loading the weights of a checkpoint alone, with an optimizer",
    ),
    Internal(
        _OPTIMIZER,
        "param_group_identifier_keys",
        _STATE,
        "finding a parameter group of a checkpoint",
    ),
    Internal(
        f"{_RANDOM}.CudaRNGStatesTracker",
        "get_states set_states",
        "training/random_states.py",
        "the random states in checkpoints",
    ),
    Internal(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        "training/checkpoint_tensors.py",
        "checkpoints that Megatron's own load reads",
    ),
    Internal(
        f"{_MIMO}.optimizer.MimoOptimizer",
        ".module_infos",
        _TIMELINE,
        "timelines with each module's optimizer",
    ),
    Internal(
        f"{_MIMO}.optimizer.ModuleOptimizerInfo",
        ".optimizer",
        _TIMELINE,
        "timelines with each module's optimizer",
    ),
    Internal(
        f"{_OPTIMIZER}.MegatronOptimizer",
        "step_with_ready_grads",
        _TIMELINE,
        "timelines with each module's optimizer",
        fallback="timelines lack the updates of parameters",
    ),
    # -- ranks on CPUs
    Internal(
        _RANDOM,
        "_get_cuda_rng_state _set_cuda_rng_state",
        _CPU,
        "random states on CPU ranks",
    ),
    Internal(
        f"{_RANDOM}.CudaRNGStatesTracker",
        "fork .states_",
        _CPU,
        "random states on CPU ranks",
    ),
    Internal(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _CPU,
        "experts on CPU ranks",
    ),
    Internal(
        _GRAD_BUFFER,
        "dist_reduce_scatter_func",
        _CPU,
        "the distributed optimizer on CPU ranks",
    ),
)
