"""Do ranks hold the same where they should?

Replicas begin alike, bit for bit: compared once, when a coordinator is built. Of what several ranks
have copies of, a checkpoint keeps one: compared before each save, as a training may have driven
apart what began alike, and shards that Megatron's ``sharded_state_dict`` calls replicas would be
lost but for one.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.layout.problems import listed, raise_problems
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.mimo_model import bare
from megatron_mimo_coord.megatron.parameters import (
    gradients_of_own_copies,
    is_tensor_parallel,
    replicated_over,
)
from megatron_mimo_coord.world.consistency import CANNOT_START
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text

logger = logging.getLogger(__name__)

Modules = Mapping[str, DistributedDataParallel]
Groups = Mapping[str, ProcessGroupCollection]

ROUNDING, DRIFT = 1e-3, 0.05  # parts of its norm by which copies of a weight may differ
PART = 0.1  # and those of its gradient
CHUNK = 1 << 22  # elements of a weight that are read at once, bit for bit
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SUMMED = (
    ", and give each the sum of their gradients, with copy_to_tensor_model_parallel_region behind "
    "a weight that feeds shards, such as an adapter's first"
)

_Key = tuple[str, str]
_KINDS = ("dp_cp", "tp_dp_cp", "expt_dp")
"""Process groups over which weights are replicated."""

_compared: WeakSet[DistributedDataParallel] = WeakSet()
"""While parameters are gathered late, replicas of a model that has been trained may differ."""


def check_replicas(names: Sequence[str], ddps: Modules, groups: Groups) -> None:
    """Compare the weights of replicas. One small collective over the world.

    Each rank has a digest of what it shares with others: of the weights that are replicated over
    DP x CP, of those that its tensor-parallel peers hold too, and of its experts. If these are the
    same nobody says more; else all ranks tell each other the digest of each weight.

    Args:
        names: all modules of the job.
        ddps: the modules on this rank.
        groups: their process groups.

    Raises:
        ValueError: on every rank, if replicas hold different values; names the weights.
    """
    keys = [(module, kind) for module in names for kind in _KINDS]
    digests: dict[_Key, dict[str, torch.Tensor]] = {}
    for module, ddp in ddps.items():
        params = dict(bare(ddp).named_parameters()) if ddp not in _compared else {}
        for name, digest in _digests(params).items():
            of_kind = digests.setdefault((module, replicated_over(params[name])), {})
            of_kind[name] = 2 * digest + params[name].requires_grad
    row = torch.full((len(keys), 2), -1, dtype=torch.int64, device=world_device())
    for (module, kind), found in digests.items():
        group = getattr(groups[module], kind, None) or groups[module].dp_cp
        total = torch.cat([*found.values()]).sum()
        first = total.new_tensor(dist.get_process_group_ranks(group)[0])
        row[keys.index((module, kind))] = torch.stack([first, total])
    rows = row.new_empty((dist.get_world_size(), *row.shape))
    dist.all_gather_into_tensor(rows, row[None])
    held: dict[tuple[_Key, int], dict[int, int]] = {}
    for rank, of_rank in enumerate(rows.tolist()):
        for key, (first_rank, total) in zip(keys, of_rank, strict=True):
            if first_rank >= 0:
                held.setdefault((key, first_rank), {})[rank] = total
    different = [
        (key, [*totals]) for (key, _), totals in held.items() if len({*totals.values()}) > 1
    ]
    if different:
        raise_problems(CANNOT_START, [*_sentences(different, digests)])
    _compared.update(ddps.values())


def _sentences(
    different: Sequence[tuple[_Key, list[int]]], digests: Mapping[_Key, Mapping[str, torch.Tensor]]
) -> Iterator[str]:
    """What replicas hold differently, by its key and its ranks. Collective over the world."""
    mine = [
        {name: int(digest) for name, digest in digests.get(key, {}).items()} for key, _ in different
    ]
    texts = all_gather_text(json.dumps(mine), device=world_device())
    everyone: list[list[dict[str, int]]] = [json.loads(text) for text in texts]
    for index, ((module, kind), ranks) in enumerate(different):
        held = [everyone[rank][index] for rank in ranks]
        every = dict.fromkeys(name for each in held for name in each)
        weights = [name for name in every if len({each.get(name) for each in held}) > 1]
        shards = "; a weight that they share out is to be one of Megatron's layers"
        yield (
            f"replicas of module {module!r} hold different values of {listed(weights)} on ranks "
            f"{listed(ranks, most=8)}, or some freeze it and some do not, and would stay "
            f"different: freeze the same on all of them, seed their initialisation alike, with "
            f"infra.initialize_megatron(seed) before the model is built, and with "
            f"infra.random_states({module!r}) around what is added to it later, such as adapters; "
            f"or load the same weights on all of them before the coordinator is built"
            f"{shards if kind == 'tp_dp_cp' else ''}"
        )


class Differing(NamedTuple):
    """A parameter that some ranks hold differently, tensor-parallel or data-parallel ones."""

    module: str
    name: str
    over_tp: bool
    ranks: list[int]


def copy_problems(
    ddps: Modules, groups: Groups, weights: ShardedWeights, differing: Sequence[Differing] = ()
) -> Iterator[str]:
    """Parameters that Megatron calls replicas and that are none.

    Args:
        ddps, groups: as :func:`check_replicas` takes them.
        weights: what is shared out, as Megatron says.
        differing: what :func:`differing_parameters` has found.
    """
    replicas = set()
    for module, ddp in ddps.items():
        for name, param in ddp.module.named_parameters():
            if not weights.is_replicated(param):
                continue
            replicas.add((module, name))
            tp = groups[module].expt_tp if ".experts." in name else groups[module].tp
            if is_tensor_parallel(param) and tp.size() > 1:
                yield (
                    f"{name} of module {module!r} is one of {tp.size()} tensor-parallel shards, "
                    f"but the module's sharded_state_dict calls it a replica, of which one would "
                    f"be kept: derive the module from MegatronModule and set its tp_group to "
                    f"pg_collection.tp"
                )
    for each in differing:
        if not each.over_tp or (each.module, each.name) in replicas:
            yield (
                f"{each.name} of module {each.module!r} is not the same on the "
                f"{'tensor' if each.over_tp else 'data'}-parallel ranks {each.ranks}, of which one "
                f"would be kept: where each has a shard, derive the module from MegatronModule and "
                f"set its tp_group to pg_collection.tp; else start them alike"
                f"{_SUMMED if each.over_tp else ''}"
            )


def differing_parameters(ddps: Modules, groups: Groups) -> list[Differing]:
    """Those that are not the same on tensor-parallel ranks, shards too, or on data-parallel ones.

    Collective in the groups of the modules. Compares one weighted sum of each. Data-parallel ranks
    get the same update; on tensor-parallel ones kernels may round otherwise, and copies drift apart
    a little in a long training, far less than shards differ. Buffers that replicas hold differently
    are named in the log: those of a batch norm have seen other images on each.
    """
    found = []
    for module, ddp in ddps.items():
        kept, params = ddp.module.state_dict(keep_vars=True), dict(ddp.module.named_parameters())
        buffers = {
            name: buffer
            for name, buffer in ddp.module.named_buffers()
            if name in kept and buffer.is_floating_point() and buffer.numel()
        }
        sums = _sums(params | buffers)
        experts = [name for name in params if ".experts." in name]
        dense = [name for name in params if name not in experts]
        tp, dp_cp = groups[module].tp, groups[module].dp_cp
        for over_tp, group, alike, tolerance in (
            (True, tp, dense, DRIFT),
            (False, dp_cp, [*dense, *buffers], ROUNDING),
            (False, groups[module].expt_dp if experts else None, experts, ROUNDING),
        ):
            names = _differing(alike, sums, group, tolerance)
            for name in names:
                if name in params:
                    ranks = dist.get_process_group_ranks(group)
                    found.append(Differing(module, name, over_tp, ranks))
            replaced = [name for name in names if name in buffers]
            if replaced and dp_cp.rank() == 0:
                logger.warning(
                    "replicas of module %r hold different values of the buffers %s, of which a "
                    "checkpoint keeps the first replica's",
                    module,
                    listed(replaced),
                )
    return found


def differing_gradients(ddp: DistributedDataParallel, tp: dist.ProcessGroup) -> list[str]:
    """Weights of a trainer's own layers whose tensor-parallel copies get different gradients.

    Not biases, whose gradient may be nothing but rounding errors, as that of keys is, and of what a
    norm follows. Collective in the module's tensor-parallel ranks.
    """
    found = gradients_of_own_copies(ddp)
    names = [name for name in found if not name.endswith("bias")]
    return _differing(names, _sums({name: found[name] for name in names}), tp, PART)


# -- numbers that tell tensors apart ---------------------------------------------------------------


@torch.no_grad()
def _digests(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers made of each bit of a weight and its place; sums wrap around."""
    found, places = {}, torch.empty(0)
    for name, weight in weights.items():
        bits = weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])
        if len(places) < min(CHUNK, len(bits)):
            places = torch.arange(1, 2 * min(CHUNK, len(bits)), 2, device=bits.device)
        parts = [(each * places[: len(each)]).sum() for each in bits.split(CHUNK)]
        found[name] = reduce(lambda total, part: total * 1_000_003 + part, parts)[None]
    return found


@torch.no_grad()
def _sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sum that is another one for most other values or another order, the norm, its rounding."""
    if not tensors:
        return {}
    longest = max(tensors.values(), key=torch.Tensor.numel)
    weights = torch.arange(longest.numel(), dtype=torch.float32, device=longest.device)
    weights.cos_().add_(1.5)
    found = {}
    for name, tensor in tensors.items():
        values = tensor.detach().float().reshape(-1)
        rounding = 4 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        total, norm = (values * weights[: len(values)]).sum(), values.norm()
        found[name] = torch.stack([total, norm, norm * rounding])
    return found


def _differing(
    names: Sequence[str],
    numbers: Mapping[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    tolerance: float,
) -> list[str]:
    """Names of the tensors that differ on the ranks of a group. Collective in it.

    Args:
        names: of those that are compared.
        numbers: of each, what :func:`_sums` says.
        group: None where nobody else holds them.
        tolerance: the part of its norm by which a sum may differ.
    """
    if not names or group is None or group.size() == 1:
        return []
    own = torch.stack([numbers[name] for name in names])
    extremes = torch.cat([own, -own[:, :1]], dim=1)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, norms, rounding, least = extremes.unbind(1)
    differs = most + least > torch.maximum(norms * tolerance, rounding)
    return [name for name, flag in zip(names, differs.tolist(), strict=True) if flag]
