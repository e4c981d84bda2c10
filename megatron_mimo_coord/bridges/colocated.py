"""Modules that share all ranks, in one forward: tokens go through the bridges in its midst.

Megatron gathers the outputs of encoders with a larger DP than the language model's, and cuts those
of encoders with a smaller one, in equal parts; a rank without an image does not take part at all.
"""

from typing import Any

import torch

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.shared_bridges import Delivered, Output, SharedBridges
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.megatron.forwards import Given
from megatron_mimo_coord.megatron.mimo_model import carry_between_modules, empty_output


def carry_in_forward(job: Job, bridges: SharedBridges, assignments: PendingAssignments) -> None:
    """Have tokens carried from encoders to the language model within a forward.

    Args:
        job: the model.
        bridges: between its modules.
        assignments: the model's.
    """
    text: torch.Tensor | None = None

    def remember_text(given: Given) -> None:
        nonlocal text
        text = given.get("input_ids")

    def carry(embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens [token, hidden] of each modality, from the encoder's layout to the language's."""
        microbatch = assignments.microbatch
        made, outputs = [], {}
        for name in bridges.encoders:
            output = embeddings.get(name)
            made.append(empty_output(job.model, name) if output is None else output)
            outputs[name] = [Output.of(made[-1], assignments.take(name), text)]
        if bridges.stays(outputs):
            bridges.say(outputs, microbatch)
            tokens = [each.to(bridges.dtype) for each in made]
        else:
            delivered = bridges.deliver(outputs, microbatch)
            tokens = _Joined.apply(delivered, bridges.encoders, *made)
        return embeddings | dict(zip(bridges.encoders, tokens, strict=True))

    job.forwards.watch(remember_text)
    carry_between_modules(job.model, carry, job.changes)


class _Joined(torch.autograd.Function):
    """What was delivered, in the graph of what was sent."""

    @staticmethod
    def forward(
        ctx: Any, delivered: Delivered, encoders: list[str], *made: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.delivered, ctx.encoders = delivered, encoders
        return tuple(delivered.tokens[name].popleft() for name in encoders)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = {name: [each] for name, each in zip(ctx.encoders, gradients, strict=True)}
        returned = ctx.delivered.give_back(given)
        return None, None, *(gradient for name in ctx.encoders for gradient in returned[name])
