"""What sequence parallelism wants of a module's weights, and of the lengths of texts."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from megatron_mimo_coord.megatron.changes import Changes

CURE = (
    "set parameter.sequence_parallel = True where it is applied to a part of the sequence, so that "
    "its gradient is summed over tensor-parallel ranks, or False where to the whole"
)


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
        is_shared = getattr(parameter, "tensor_model_parallel", False)
        is_expert = not getattr(parameter, "allreduce", True)
        is_summed = getattr(config, "qk_layernorm", False) and (
            "q_layernorm" in name or "k_layernorm" in name
        )
        if parameter.requires_grad and not (says or is_shared or is_expert or is_summed):
            yield name, name.startswith(tuple(layers)) if layers else False


def weight_problems(name: str, ddp: DistributedDataParallel) -> list[str]:
    """A sentence if the gradient of a weight would be a part of what it is."""
    inside = [weight for weight, is_inside in unmarked_weights(ddp) if is_inside]
    if not inside:
        return []
    return [
        f"module {name!r} is sequence-parallel, and its replicated weights {_list(inside)} do not "
        f"say what they are applied to: their gradients would be wrong; {CURE}"
    ]


def weight_remark(name: str, ddp: DistributedDataParallel) -> str:
    """What to look at: weights of which nobody says whether they see the whole sequence."""
    outside = [weight for weight, is_inside in unmarked_weights(ddp) if not is_inside]
    if not outside:
        return ""
    return (
        f"module {name} is sequence-parallel, and its replicated weights {_list(outside)} are "
        f"taken to see the whole sequence; else {CURE}"
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def refuse_other_lengths(model: MimoModel, changes: Changes) -> None:
    """Have every rank refuse a text whose length the language model cannot share out.

    Args:
        model: whose ``config`` is the language model's on every rank.
        changes: where is recorded what is hooked to it.
    """
    parts = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1

    def check(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_tensor(input_ids) and input_ids.shape[-1] % parts:
            raise ValueError(
                f"texts have {input_ids.shape[-1]} tokens, which the {parts} tensor-parallel ranks "
                f"of the sequence-parallel language model cannot share: pad them to a multiple of "
                f"{parts}"
            )

    if parts > 1:
        changes.on_close(model.register_forward_pre_hook(check, with_kwargs=True).remove)
