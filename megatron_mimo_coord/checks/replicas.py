"""Do ranks hold the same where they should?

Replicas begin alike, bit for bit: compared once, when a coordinator is built. Of what several ranks
have copies of, a checkpoint keeps one: compared before each save, as a training may have driven
apart what began alike, and shards that Megatron's ``sharded_state_dict`` calls replicas would be
lost but for one.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.mimo_model import bare
from megatron_mimo_coord.megatron.parameters import (
    gradients_of_own_copies,
    is_tensor_parallel,
    replicated_over,
)
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

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

_compared: WeakSet[DistributedDataParallel] = WeakSet()
"""While parameters are gathered late, replicas of a model that has been trained may differ."""


def check_replicas(ddps: Modules, groups: Groups) -> None:
    """Compare the weights of replicas. Collective in the groups of the modules and over the world.

    Args:
        ddps: the modules on this rank.
        groups: their process groups.

    Raises:
        ValueError: on every rank, if replicas hold different values; names the weights.
    """
    problems = []
    for module, ddp in ddps.items():
        params = dict(bare(ddp).named_parameters()) if ddp not in _compared else {}
        digests = {n: 2 * each + params[n].requires_grad for n, each in _digests(params).items()}
        alike = {name: replicated_over(param) for name, param in params.items()}
        whole = [name for name in params if alike[name] == "tp_dp_cp"]
        dense = [name for name in params if alike[name] != "expt_dp"]
        experts = [name for name in params if alike[name] == "expt_dp"]
        tp, dp_cp = groups[module].tp, groups[module].dp_cp
        expt_dp = getattr(groups[module], "expt_dp", None) or dp_cp
        differing = {
            *_differing(whole, digests, tp),
            *_differing(dense, digests, dp_cp),
            *_differing(experts, digests, expt_dp),
        }
        if differing:
            shards = "; a weight that they share out is to be one of Megatron's layers"
            problems.append(
                f"replicas of module {module!r} hold different values of "
                f"{listed([name for name in params if name in differing])}, or some freeze it and "
                f"some do not, and would stay different: freeze the same on all of them, seed "
                f"their initialisation alike, with infra.initialize_megatron(seed) before the "
                f"model is built, and with infra.random_states({module!r}) around what is added to "
                f"it later, such as adapters; or load the same weights on all of them before the "
                f"coordinator is built{shards if differing.intersection(whole) else ''}"
            )
    check_consistency(lambda: RankFacts({}, {}, problems))
    _compared.update(ddps.values())


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
    tolerance: float = 0.0,
) -> list[str]:
    """Names of the tensors that differ on the ranks of a group. Collective in it.

    Args:
        names: of those that are compared.
        numbers: of each its digest alone, or what :func:`_sums` says.
        group: None where nobody else holds them.
        tolerance: the part of its norm by which a sum may differ.
    """
    if not names or group is None or group.size() == 1:
        return []
    own = torch.stack([numbers[name] for name in names])
    extremes = torch.cat([own, -own[:, :1]], dim=1)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, *norms, least = extremes.unbind(1)
    differs = most != -least
    if norms:
        differs = most + least > torch.maximum(norms[0] * tolerance, norms[1])
    return [name for name, flag in zip(names, differs.tolist(), strict=True) if flag]
