"""From the losses of each microbatch on the last stage to one number that every rank can print."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def reduce_losses(
    losses: Sequence[Mapping[str, Any]],
    group: dist.ProcessGroup | None,
    source: int,
    device: torch.device,
) -> dict[str, float]:
    """Average over microbatches and replicas, then tell every rank. Collective over the world.

    Args:
        losses: what the schedule returned: a map a microbatch on the ranks that computed a loss,
            nothing on the others. A value is a number, or a pair (sum, weight).
        group: the language model's DP x CP group on the ranks that computed a loss, else None.
        source: global rank that tells the others; it computed a loss.
        device: where the group's backend expects tensors.

    Returns:
        Each name with sum of sums / sum of weights; a plain number has weight 1. As Megatron's
        training loop reports it; 0 where all weights are 0.
    """
    means: list[dict[str, float] | None] = [None]
    if group is not None:
        names = list(dict.fromkeys(name for microbatch in losses for name in microbatch))
        pairs = torch.zeros((len(names), 2), dtype=torch.float64, device=device)
        for microbatch in losses:
            for index, name in enumerate(names):
                if name in microbatch:
                    pairs[index] += _pair(name, microbatch[name], device)
        dist.all_reduce(pairs, group=group)
        means = [
            {
                name: total / weight if weight else 0.0
                for name, (total, weight) in zip(names, pairs.tolist(), strict=True)
            }
        ]
    dist.broadcast_object_list(means, src=source)
    assert means[0] is not None
    return means[0]


def _pair(name: str, value: Any, device: torch.device) -> torch.Tensor:
    """(sum, weight) of a reported value."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device).detach().flatten()
    if tensor.numel() == 1:
        return torch.stack((tensor[0], torch.ones_like(tensor[0])))
    if tensor.numel() != 2:
        raise ValueError(
            f"loss {name!r} has {tensor.numel()} values; report a number or a pair (sum, weight), "
            f"such as torch.stack((loss.sum(), num_tokens))"
        )
    return tensor
