"""Modules that share all ranks, in one forward: tokens go through the bridges in its midst.

Megatron gathers the outputs of encoders with a larger DP than the language model's, and cuts those
of encoders with a smaller one, in equal parts; a rank without an image does not take part at all.
"""

from typing import Any

import torch
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.shared_bridges import Delivered, Output, SharedBridges
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import (
    carry_between_modules,
    empty_output,
    input_ids_of,
)


def carry_in_forward(
    model: MimoModel, bridges: SharedBridges, assignments: PendingAssignments, changes: Changes
) -> None:
    """Have tokens carried from encoders to the language model within a forward.

    Args:
        model: the model.
        bridges: between its modules.
        assignments: the model's.
        changes: where is recorded what is changed in the model.
    """
    input_ids: torch.Tensor | None = None

    def remember_text(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal input_ids
        input_ids = input_ids_of(args, kwargs)

    def carry(embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens [token, hidden] of each modality, from the encoder's layout to the language's."""
        microbatch = assignments.microbatch
        made, outputs = [], {}
        for name in bridges.encoders:
            output = embeddings.get(name)
            made.append(empty_output(model, name) if output is None else output)
            given = made[-1].detach().requires_grad_(made[-1].requires_grad)
            outputs[name] = [Output(given, assignments.take(name), input_ids)]
        if bridges.stays(outputs):
            bridges.say(outputs, microbatch)
            tokens = [each.to(bridges.dtype) for each in made]
        else:
            delivered = bridges.deliver(outputs, microbatch)
            tokens = _Joined.apply(delivered, bridges.encoders, *made)
        return embeddings | dict(zip(bridges.encoders, tokens, strict=True))

    changes.on_close(model.register_forward_pre_hook(remember_text, with_kwargs=True).remove)
    carry_between_modules(model, carry, changes)


class _Joined(torch.autograd.Function):
    """What was delivered, in the graph of what was sent."""

    @staticmethod
    def forward(
        ctx: Any, delivered: Delivered, encoders: list[str], *made: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.delivered, ctx.encoders = delivered, encoders
        return tuple(tokens for name in encoders for tokens in delivered.tokens.pop(name))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = {name: [each] for name, each in zip(ctx.encoders, gradients, strict=True)}
        returned = ctx.delivered.give_back(given)
        return None, None, *(gradient for name in ctx.encoders for gradient in returned[name])
