"""Do replicas hold the same weights? Compared once, when a coordinator is built.

Each rank has a digest of what it shares with others: of the weights that are replicated over
DP x CP, of those that its tensor-parallel peers hold too, and of its experts. If these are the same
nobody says more; else all ranks tell each other the digest of each weight.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.layout.problems import listed, raise_problems
from megatron_mimo_coord.megatron.mimo_model import bare
from megatron_mimo_coord.megatron.parameters import replicated_over
from megatron_mimo_coord.world.consistency import CANNOT_START
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text

CHUNK = 1 << 22
"""Elements of a weight that are read at once."""

KINDS = ("dp_cp", "tp_dp_cp", "expt_dp")
"""Process groups over which weights are replicated."""

_compared: WeakSet[DistributedDataParallel] = WeakSet()
"""While parameters are gathered late, replicas of a model that has been trained may differ."""


def check_replicas(
    names: list[str],
    ddps: Mapping[str, DistributedDataParallel],
    pg_collections: Mapping[str, ProcessGroupCollection],
) -> None:
    """Compare the weights of replicas. One small collective over the world.

    Args:
        names: all modules of the job.
        ddps: the modules on this rank.
        pg_collections: process groups of those on this rank.

    Raises:
        ValueError: on every rank, if replicas hold different values; names the weights.
    """
    device = world_device()
    digests = {name: _digests(ddp, device) for name, ddp in ddps.items() if ddp not in _compared}
    row = torch.full((len(names), len(KINDS), 2), -1, dtype=torch.int64, device=device)
    for number, name in enumerate(names):
        for column, kind in enumerate(KINDS if name in digests else ()):
            group = getattr(pg_collections[name], kind, None) or pg_collections[name].dp_cp
            found = list(digests[name][kind].values())
            if found:
                row[number, column, 0] = dist.get_process_group_ranks(group)[0]
                row[number, column, 1] = torch.stack(found).sum()
    rows = row.new_empty((dist.get_world_size(), *row.shape))
    dist.all_gather_into_tensor(rows, row[None])
    different = _different(rows.tolist(), names)
    if different:
        raise_problems(CANNOT_START, list(_sentences(different, digests)))
    _compared.update(ddps.values())


Digests = Mapping[str, dict[str, torch.Tensor]]


def _digests(ddp: DistributedDataParallel, device: torch.device) -> Digests:
    """Of each weight, under the group over which it is replicated."""
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for name, parameter in bare(ddp).named_parameters():
        found[replicated_over(parameter)][name] = _digest(parameter.detach(), device)
    return found


def _digest(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A number made of each bit of a weight and its place; sums wrap around."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for part in weight.reshape(-1).split(CHUNK):
        numbers = part.contiguous().view(_INTEGERS[part.element_size()]).to(torch.int64)
        places = torch.arange(len(numbers), device=numbers.device) * 2 + 1
        total = total * 1_000_003 + (numbers * (places * 0x9E3779B97F4A7C1)).sum().to(device)
    return total


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _different(
    rows: list[list[list[list[int]]]], names: list[str]
) -> list[tuple[str, str, list[int]]]:
    """(module, group, its ranks) of what replicas hold differently."""
    held: defaultdict[tuple[str, str, int], dict[int, int]] = defaultdict(dict)
    for rank, modules in enumerate(rows):
        for name, kinds in zip(names, modules, strict=True):
            for kind, (leader, digest) in zip(KINDS, kinds, strict=True):
                if leader >= 0:
                    held[name, kind, leader][rank] = digest
    return [
        (name, kind, list(of_rank))
        for (name, kind, _), of_rank in held.items()
        if len(set(of_rank.values())) > 1
    ]


def _sentences(
    different: list[tuple[str, str, list[int]]], digests: Mapping[str, Digests]
) -> Iterator[str]:
    """A sentence for each module and group, with its weights. Collective over the world."""
    mine = {
        f"{name} {kind}": {weight: int(digest) for weight, digest in digests[name][kind].items()}
        for name, kind, _ in different
        if name in digests
    }
    texts = all_gather_text(json.dumps(mine), device=world_device())
    everyone: list[dict[str, dict[str, int]]] = [json.loads(text) for text in texts]
    for name, kind, ranks in different:
        held = [everyone[rank][f"{name} {kind}"] for rank in ranks]
        weights = [
            weight for weight in held[0] if len({str(each.get(weight)) for each in held}) > 1
        ]
        cure = (
            "seed their initialisation alike, with infra.initialize_megatron(seed) before the "
            "model is built, or load the same weights on all of them before the coordinator is"
        )
        if kind == "tp_dp_cp":
            cure += "; a weight that they share out is to be one of Megatron's layers"
        yield (
            f"replicas of module {name!r} hold different values of {listed(weights)} on ranks "
            f"{', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}, and would stay "
            f"different: {cure}"
        )
