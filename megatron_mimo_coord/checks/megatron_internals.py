"""Names in Megatron-Core that this package relies on and that Megatron does not promise to keep.

One table: what, which file of this package uses it, and what does not work without it. A
coordinator looks for every entry when it is built, and names those that are missing in one sentence
each. To move to another Megatron-Core, run the test of this table, and change the files that it
names.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from attrs import field, frozen
from megatron.core import __version__ as megatron_version
from megatron.core.distributed import DistributedDataParallel


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@frozen
class Internal:
    """Names of Megatron-Core that one file of this package uses.

    Args:
        owner: dotted path of the class or module that has the names.
        names: the attributes.
        used_by: file of this package.
        affects: what does not work where they are missing.
        found_on: the objects of a module's DDP that carry the names, where they are not the
            owner's own but set in its constructor.
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
            return [name for name in self.names if not hasattr(_resolve(self.owner), name)]
        parts = [part for ddp in ddps for part in self.found_on(ddp)]
        return [name for name in self.names if not all(hasattr(part, name) for part in parts)]

    def sentence(self, missing: Iterable[str]) -> str:
        """What is missing, what of this package is affected, and what to do."""
        instead = self.fallback or "use megatron-core 0.19, or the release of this package for it"
        return (
            f"megatron-core {megatron_version}: {self.owner} has no {', '.join(missing)}, which "
            f"megatron_mimo_coord/{self.used_by} relies on for {self.affects}; {instead}"
        )


def internals_problems(ddps: Iterable[DistributedDataParallel]) -> list[str]:
    """A sentence for each entry of the table that the installed Megatron-Core lacks."""
    ddps = list(ddps)
    return [
        internal.sentence(missing)
        for internal in INTERNALS
        if not internal.fallback and (missing := internal.missing(ddps))
    ]


def _resolve(path: str) -> Any:
    """The module or class at a dotted path, None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return import_module(path)
    except ModuleNotFoundError:
        return getattr(import_module(module), name, None)


def _ddp(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield ddp


def _buffers(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield from (*ddp.buffers, *ddp.expert_parallel_buffers)


def _bucket_groups(ddp: DistributedDataParallel) -> Iterator[Any]:
    yield from (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups)


def _buckets(ddp: DistributedDataParallel) -> Iterator[Any]:
    for group in _bucket_groups(ddp):
        yield from group.buckets


_BUFFER_FILE = "megatron.core.distributed.param_and_grad_buffer"
_PIPELINE = "megatron.core.pipeline_parallel"
_MIMO = "megatron.core.models.mimo"

INTERNALS = (
    Internal(
        "megatron.core.distributed.DistributedDataParallel",
        "buffers expert_parallel_buffers bucket_groups expert_parallel_bucket_groups dp_cp_group "
        "expt_dp_group params_with_grad",
        "gradients/buckets.py",
        "reading how gradients are laid out",
        _ddp,
    ),
    Internal(
        "megatron.core.distributed.DistributedDataParallel",
        "force_all_reduce remove_forward_pre_hook_handles",
        "gradients/launch_order.py",
        "the order in which reductions are launched and parameters gathered",
        _ddp,
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBucket",
        "gradient_scaling_factor",
        "gradients/scaling.py",
        "scaling gradients in DDP's own pass",
        _buckets,
        fallback="they are scaled in a pass of their own after the reduction",
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBuffer",
        "extra_main_grads",
        "gradients/scaling.py",
        "scaling gradients that are accumulated beside their buffer",
        _buffers,
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBuffer",
        "grad_data",
        "gradients/buckets.py",
        "reading how gradients are laid out",
        _buffers,
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBucket",
        "grad_data params_list param_to_index",
        "gradients/buckets.py",
        "the norms of gradients",
        _buckets,
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBucketGroup",
        "params grad_reduce_handle is_first_batch per_param_grad_ready_counts param_gather_handle "
        "param_gather_dispatched next_param_gather_bucket_group",
        "gradients/launch_order.py",
        "the order in which reductions are launched",
        _bucket_groups,
    ),
    Internal(
        f"{_BUFFER_FILE}._ParamAndGradBucketGroup",
        "start_grad_sync finish_grad_sync reset start_param_sync finish_param_sync",
        "gradients/launch_order.py",
        "the order in which reductions are launched and parameters gathered",
    ),
    Internal(
        "megatron.core.parallel_state",
        "_GLOBAL_MEMORY_BUFFER _set_global_memory_buffer",
        "world/global_state.py",
        "the buffer that tensor-parallel layers gather into",
    ),
    Internal(
        f"{_MIMO}.optimizer.MimoOptimizer",
        "prepare_grads get_grad_norm",
        "gradients/finite_steps.py",
        "skipping steps that are not finite",
    ),
    Internal(
        f"{_PIPELINE}.bridge_communicator.BridgeCommunicator",
        "destroy_broadcast_pgs destroy_bridge_pgs",
        "infra.py",
        "giving the groups of bridges back",
    ),
    Internal(
        f"{_PIPELINE}.multimodule_communicator.MultiModulePipelineCommunicator",
        "_build_bridge_comms current_stage total_stages",
        "bridges/communicator.py",
        "activations between modules on disjoint ranks",
    ),
    Internal(
        f"{_MIMO}.MimoModel",
        "_attach_modality_split_sizes _has_encoder_tokens",
        "bridges/token_counts.py",
        "samples with different numbers of tokens",
    ),
    Internal(
        f"{_MIMO}.MimoModel",
        "_apply_colocated_comms _empty_encoder_output",
        "bridges/colocated.py",
        "activations between modules on the same ranks",
    ),
    Internal(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        "_get_model_param_range_map _get_main_param_and_optimizer_states "
        "_set_main_param_and_optimizer_states",
        "training/training_state.py",
        "checkpoints of the distributed optimizer, without gathering it",
    ),
    Internal(
        "megatron.core.optimizer.optimizer",
        "param_group_identifier_keys",
        "training/training_state.py",
        "finding a parameter group of a checkpoint",
    ),
    Internal(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        "training/checkpoint_tensors.py",
        "checkpoints that Megatron's own load reads",
    ),
)
