"""From the losses of each microbatch on the last stage to numbers that every rank can print.

One collective of numbers: each rank sends a row of fixed size, so that ranks without a loss need
not know which there are. A row has the names of the losses as bytes, then a sum and a weight for
each. Nothing waits for the device: rows are added up when someone looks at the result.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.problems import raise_problems
from megatron_mimo_coord.metrics.lazy_dict import LazyDict
from megatron_mimo_coord.world.consistency import RankFacts, disagreements
from megatron_mimo_coord.world.device import world_device

MOST_LOSSES = 64
MOST_BYTES = 1024
"""Of all names together, as a JSON list."""

# What a row says: nothing, names and numbers, or what is wrong with the losses.
_SILENT, _NAMES, _PROBLEM = range(3)
_HEADER = 2 + MOST_BYTES // 8  # what, bytes of the text, the text
_ROW = _HEADER + 2 * MOST_LOSSES


def reduce_losses(
    losses: Sequence[Mapping[str, Any]], *, reports: bool, counts: bool
) -> dict[str, float]:
    """Average over microbatches and replicas, for every rank. Collective over the world.

    Args:
        losses: what the schedule returned: a map a microbatch on the ranks that computed a loss. A
            value is a number, or a pair (sum, weight).
        reports: whether this rank computed a loss.
        counts: whether this rank's numbers count; one of those that hold the same ones does.

    Returns:
        Each name with sum of sums / sum of weights; a plain number has weight 1. As Megatron's
        training loop reports it; 0 where all weights are 0. A dict that waits for the device when
        it is first looked at.

    Raises:
        ValueError: a value is neither a number nor a pair, there are too many losses, or ranks
            report different ones: where it happened at once, elsewhere when the result is looked
            at.
    """
    device = world_device()
    pairs = _pairs(losses, device) if reports else {}
    problem = _problem(pairs)
    numbers = torch.zeros(2 * MOST_LOSSES, dtype=torch.float64, device=device)
    if pairs and counts and not problem:
        sums = torch.cat([torch.stack(of_name).sum(0) for of_name in pairs.values()])
        numbers[: len(sums)] = sums
    what = _PROBLEM if problem else _NAMES if reports else _SILENT
    text = problem or json.dumps(list(pairs))
    row = torch.cat([_header(what, text, device), numbers.view(torch.int64)])
    rows = row.new_empty((dist.get_world_size(), _ROW))
    dist.all_gather_into_tensor(rows, row.unsqueeze(0))
    if problem:
        raise ValueError(problem)
    return LazyDict(partial(_read, rows))


def _pairs(
    losses: Sequence[Mapping[str, Any]], device: torch.device
) -> dict[str, list[torch.Tensor]]:
    """Of each name, (sum, weight) of every microbatch."""
    one = torch.ones(1, dtype=torch.float64, device=device)
    pairs: dict[str, list[torch.Tensor]] = {}
    for microbatch in losses:
        for name, value in microbatch.items():
            numbers = _numbers(value, device)
            pair = torch.cat([numbers, one]) if len(numbers) == 1 else numbers
            pairs.setdefault(str(name), []).append(pair)
    return pairs


def _numbers(value: Any, device: torch.device) -> torch.Tensor:
    """All numbers of a value in one dim, in fp64 on the device, without waiting for it."""
    if isinstance(value, (tuple, list)) and value:
        return torch.cat([_numbers(each, device) for each in value])
    tensor = torch.as_tensor(value).detach().flatten()
    return tensor.to(device, torch.float64, non_blocking=True)


def _problem(pairs: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """What is wrong with this rank's losses, if anything."""
    for name, of_name in pairs.items():
        for pair in of_name:
            if len(pair) != 2:
                return (
                    f"loss {name!r} has {len(pair)} values; report a number or a pair (sum, "
                    f"weight), such as torch.stack((loss.sum(), num_tokens))"
                )
    size = len(json.dumps(list(pairs)).encode())
    if len(pairs) > MOST_LOSSES or size > MOST_BYTES:
        return (
            f"there are {len(pairs)} losses with names of {size} bytes, but {MOST_LOSSES} and "
            f"{MOST_BYTES} travel at most; report fewer, under shorter names"
        )
    return ""


@lru_cache(maxsize=8)
def _header(what: int, text: str, device: torch.device) -> torch.Tensor:
    """The beginning of a row; names are the same in every step, so they are copied once."""
    content = text.encode()[:MOST_BYTES]
    words = [what, len(content)]
    header = torch.zeros(_HEADER, dtype=torch.int64)
    header[:2] = torch.tensor(words)
    header[2:].view(torch.uint8)[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return header.to(device, non_blocking=True)


def _read(rows: torch.Tensor) -> dict[str, float]:
    """The means of all rows.

    Raises:
        ValueError: a rank found a problem, or ranks report different names.
    """
    rows = rows.cpu()
    headers, of_rank = rows[:, :_HEADER].unique(dim=0, return_inverse=True)
    said = [_said(header) for header in headers]
    statements = [said[index] for index in of_rank.tolist()]
    raise_problems("these losses cannot be reduced", disagreements([_fact(*s) for s in statements]))
    totals: dict[str, torch.Tensor] = {}
    for index, (what, text) in enumerate(said):
        sums = rows[of_rank == index, _HEADER:].contiguous().view(torch.float64).sum(0)
        for name, pair in zip(json.loads(text) if what else [], sums.view(-1, 2), strict=False):
            totals[name] = totals[name] + pair if name in totals else pair
    means = {name: pair.tolist() for name, pair in totals.items()}
    return {name: total / weight if weight else 0.0 for name, (total, weight) in means.items()}


def _said(header: torch.Tensor) -> tuple[int, str]:
    what, size = header[:2].tolist()
    return what, bytes(header[2:].view(torch.uint8)[:size].tolist()).decode(errors="replace")


def _fact(what: int, text: str) -> RankFacts:
    if what == _PROBLEM:
        return RankFacts({}, {}, [text])
    names = {"names of the losses": ", ".join(sorted(json.loads(text)))}
    return RankFacts({}, {LANGUAGE: names} if what == _NAMES else {})
