"""What parameters say of themselves: where they are replicated, and what they are applied to.

Leans on ``tensor_model_parallel`` and ``allreduce``, on ``sequence_parallel`` and
``average_gradients_across_tp_domain`` of a parameter, which Megatron's finalize reads, and on
layers being of one class. Without these a weight that gets a part of its gradient is not told.
"""

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_layer import BaseTransformerLayer


def unmarked_weights(ddp: DistributedDataParallel) -> Iterator[tuple[str, bool]]:
    """Replicated weights of a sequence-parallel module that do not say what they are applied to.

    Megatron sums the gradients of those alone whose ``sequence_parallel`` is set.

    Yields:
        A parameter's name, and whether it is inside a transformer layer, where it is applied to a
        part of the sequence.
    """
    config = ddp.config
    if not getattr(config, "sequence_parallel", False) or ddp.tp_group.size() == 1:
        return
    layers = [f"{n}." for n, m in ddp.module.named_modules() if isinstance(m, BaseTransformerLayer)]
    for name, parameter in ddp.module.named_parameters():
        says = any(
            hasattr(parameter, attribute)
            for attribute in ("sequence_parallel", "average_gradients_across_tp_domain")
        )
        is_shared = is_tensor_parallel(parameter)
        is_expert = not getattr(parameter, "allreduce", True)
        is_summed = getattr(config, "qk_layernorm", False) and (
            "q_layernorm" in name or "k_layernorm" in name
        )
        if parameter.requires_grad and not (says or is_shared or is_expert or is_summed):
            yield name, name.startswith(tuple(layers)) if layers else False


def replicated_over(parameter: torch.nn.Parameter) -> str:
    """The process group in which all ranks hold the same parameter."""
    if not getattr(parameter, "allreduce", True):
        return "expt_dp"
    return "dp_cp" if is_tensor_parallel(parameter) else "tp_dp_cp"


def is_tensor_parallel(parameter: torch.nn.Parameter) -> bool:
    """Whether it is one of several shards."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
