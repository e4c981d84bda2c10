"""What sharing sequences out wants of a module's weights, and of the lengths of texts."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import input_ids_of, sequence_parts
from megatron_mimo_coord.megatron.parameters import unmarked_weights

CURE = (
    "set parameter.sequence_parallel = True where it is applied to a part of the sequence, so that "
    "its gradient is summed over tensor-parallel ranks, or False where to the whole"
)


def weight_problems(name: str, ddp: DistributedDataParallel) -> list[str]:
    """A sentence if the gradient of a weight would be a part of what it is."""
    inside = [weight for weight, is_inside in unmarked_weights(ddp) if is_inside]
    if not inside:
        return []
    return [
        f"module {name!r} is sequence-parallel, and its replicated weights {listed(inside)} do not "
        f"say what they are applied to: their gradients would be wrong; {CURE}"
    ]


def weight_remark(name: str, ddp: DistributedDataParallel) -> str:
    """What to look at: weights of which nobody says whether they see the whole sequence."""
    outside = [weight for weight, is_inside in unmarked_weights(ddp) if not is_inside]
    if not outside:
        return ""
    return (
        f"module {name} is sequence-parallel, and its replicated weights {listed(outside)} are "
        f"taken to see the whole sequence; else {CURE}"
    )


def refuse_other_lengths(model: MimoModel, changes: Changes) -> None:
    """Have every rank refuse a text whose length the language model cannot share out.

    Args:
        model: whose ``config`` is the language model's on every rank, and whose grids are all.
        changes: where is recorded what is hooked to it.
    """
    parts, why = sequence_parts(model)

    def check(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = input_ids_of(args, kwargs)
        if torch.is_tensor(input_ids) and (length := input_ids.shape[-1]) % parts:
            raise ValueError(
                f"texts have {length} tokens, which {parts} ({why}) does not divide, and so the "
                f"language model's ranks cannot share them: pad them to "
                f"{-(-length // parts) * parts}, or any multiple of {parts}"
            )

    if parts > 1:
        changes.on_close(model.register_forward_pre_hook(check, with_kwargs=True).remove)
