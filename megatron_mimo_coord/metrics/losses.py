"""From the losses of each microbatch on the last stage to one number that every rank can print."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def reduce_losses(
    losses: Sequence[Mapping[str, Any]], group: dist.ProcessGroup | None, source: int
) -> dict[str, float]:
    """Average over microbatches and replicas, then tell every rank. Collective over the world.

    Args:
        losses: what the schedule returned: a map a microbatch on the ranks that computed a loss,
            nothing on the others. A value is a number, or a pair (sum, weight).
        group: the language model's DP x CP group on the ranks that computed a loss, else None.
        source: global rank that tells the others; it computed a loss.

    Returns:
        Each name with sum of sums / sum of weights; a plain number has weight 1. As Megatron's
        training loop reports it; 0 where all weights are 0.

    Raises:
        ValueError: on every rank, if a value is neither a number nor a pair.
    """
    told: list[dict[str, float] | str] = [{}]
    if group is not None:
        sums: list[dict[str, list[float]] | str] = [""] * group.size()
        dist.all_gather_object(sums, _sums(losses), group=group)
        told = [_means(sums)]
    dist.broadcast_object_list(told, src=source)
    if isinstance(told[0], str):
        raise ValueError(told[0])
    return told[0]


def _sums(losses: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | str:
    """[sum, weight] of each name over this rank's microbatches, or what is wrong with one."""
    sums: dict[str, list[float]] = {}
    for microbatch in losses:
        for name, value in microbatch.items():
            pair = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
            if len(pair) not in (1, 2):
                return (
                    f"loss {name!r} has {len(pair)} values; report a number or a pair (sum, "
                    f"weight), such as torch.stack((loss.sum(), num_tokens))"
                )
            total, weight = pair if len(pair) == 2 else (pair[0], 1.0)
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + total, before[1] + weight]
    return sums


def _means(replicas: Sequence[dict[str, list[float]] | str]) -> dict[str, float] | str:
    """Means over all replicas, or the first replica's complaint."""
    totals: dict[str, list[float]] = {}
    for sums in replicas:
        if isinstance(sums, str):
            return sums
        for name, (total, weight) in sums.items():
            before = totals.get(name, [0.0, 0.0])
            totals[name] = [before[0] + total, before[1] + weight]
    return {name: total / weight if weight else 0.0 for name, (total, weight) in totals.items()}
