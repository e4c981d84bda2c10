"""What parameters say of themselves: where they are replicated, and what they are applied to.

Leans on ``tensor_model_parallel`` and ``allreduce``, on ``sequence_parallel`` and
``average_gradients_across_tp_domain`` of a parameter, which Megatron's finalize reads, on layers
being of one class, and on the ``tp_group`` of tensor-parallel ones, which is None where a trainer
gave none: then they are whole on each rank. Without these a weight that gets a part of its
gradient, or another on each rank, is not told.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_layer import BaseTransformerLayer


def unmarked_weights(ddp: DistributedDataParallel) -> Iterator[tuple[str, bool]]:
    """Replicated weights of a sequence-parallel module that do not say what they are applied to.

    Megatron sums the gradients of those alone whose ``sequence_parallel`` is set.

    Yields:
        A parameter's name, and whether it is inside a transformer layer, where it is applied to a
        part of the sequence.
    """
    if not getattr(ddp.config, "sequence_parallel", False):
        return
    layers = [f"{n}." for n, m in ddp.module.named_modules() if isinstance(m, BaseTransformerLayer)]
    for name in gradients_of_own_copies(ddp):
        yield name, name.startswith(tuple(layers)) if layers else False


def gradients_of_own_copies(ddp: DistributedDataParallel) -> dict[str, Any]:
    """Of each trained weight that tensor-parallel ranks all hold, and is none of Megatron's."""
    found = {}
    for name, parameter in ddp.module.named_parameters() if ddp.tp_group.size() > 1 else ():
        says = any(
            hasattr(parameter, attribute)
            for attribute in ("sequence_parallel", "average_gradients_across_tp_domain")
        )
        is_expert = not getattr(parameter, "allreduce", True)
        is_summed = getattr(ddp.config, "qk_layernorm", False) and (
            "q_layernorm" in name or "k_layernorm" in name
        )
        is_own = not (says or is_tensor_parallel(parameter) or is_expert or is_summed)
        if parameter.requires_grad and is_own:
            found[name] = getattr(parameter, "main_grad", None)  # there once all is checked
    return found


def layers_on_other_ranks(
    ddp: DistributedDataParallel, groups: ProcessGroupCollection
) -> Iterator[str]:
    """Tensor-parallel layers that are shared out over other ranks than those of their module."""
    own = [
        dist.get_process_group_ranks(group)
        for group in (groups.tp, getattr(groups, "expt_tp", None))
        if group is not None
    ]
    for name, layer in ddp.module.named_modules():
        if any(map(is_tensor_parallel, layer.parameters(recurse=False))):
            group = getattr(layer, "tp_group", None)
            if group is not None or isinstance(layer, _TENSOR_PARALLEL):
                ranks = dist.get_process_group_ranks(group) if group else [dist.get_rank()]
                if ranks not in own:
                    yield name


_TENSOR_PARALLEL = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def replicated_over(parameter: torch.nn.Parameter) -> str:
    """The process group in which all ranks hold the same parameter."""
    if not getattr(parameter, "allreduce", True):
        return "expt_dp"
    return "dp_cp" if is_tensor_parallel(parameter) else "tp_dp_cp"


def is_tensor_parallel(parameter: torch.nn.Parameter) -> bool:
    """Whether it is one of several shards."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
