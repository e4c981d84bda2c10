"""What a checkpoint holds of a training: every weight, and what the optimizer keeps for it.

Megatron's ``sharded_state_dict`` says which part of which whole tensor each weight is. What the
optimizer keeps for a weight lies where the weight lies: with the distributed optimizer each replica
has a range of its elements, which it writes and reads by itself. So nothing is gathered, and what
was written fits every layout, with the distributed optimizer or without.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.checkpoints import sharded_state_dict
from megatron_mimo_coord.training.boxes import Box, boxes_of_range
from megatron_mimo_coord.training.checkpoint_tensors import Chunk
from megatron_mimo_coord.training.plain_data import decode, encode

_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")  # a resumed training may have others
_LAYOUT = ("is_expert_parallel",)  # where experts are on several ranks

ROUNDING, DRIFT = 1e-3, 0.05  # parts of its norm by which replicas of a weight may differ


class ModelState:
    """The weights and buffers of the modules on this rank.

    Args:
        job: whose model's ``sharded_state_dict`` says where each weight lies in the whole model.
        stacked: whether equal layers are one tensor, as in checkpoints of format 1.

    Attributes:
        names: for the key of each tensor here, what the whole bare model's ``state_dict`` calls it.
    """

    def __init__(self, job: Job, stacked: bool = False) -> None:
        self._model = job.model
        self._job = job
        groups = job.infra.pg_collections
        sharded, self.names = sharded_state_dict(job.model, groups, LANGUAGE, stacked)
        self._weights = {
            id(each.data): each
            for each in nested_values(sharded)
            if isinstance(each, ShardedTensor | ShardedTensorFactory)
        }
        self._sharded, self._local, self._factories = load_preprocess(sharded)

    def chunks(self) -> Iterator[Chunk]:
        """All tensors of this rank."""
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedTensor):
                yield Chunk(
                    key=each.key,
                    shape=tuple(each.global_shape),
                    box=_box(each),
                    data=each.data.detach(),
                    writes=is_main_replica(each.replica_id),
                    padded_for=_padded_for(each),
                )

    def objects(self) -> Iterator[tuple[str, Any, bool]]:
        """(key, object, whether this rank writes it) of what modules keep beside tensors.

        Transformer Engine's do, for fp8.
        """
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedObject):
                yield each.unique_key, each.data, is_main_replica(each.replica_id)

    def shards(self, param: torch.nn.Parameter) -> Iterator[tuple[ShardedTensor, int]]:
        """The parts of whole tensors that a parameter is made of, and at which element each begins.

        One part, but for those that Megatron takes apart, such as the halves of a gated MLP.

        Raises:
            KeyError: the parameter is not in the model's ``sharded_state_dict``.
        """
        found = self._weights[id(param)]
        if isinstance(found, ShardedTensor):
            yield found, 0
            return
        # Which elements does each part take? Let Megatron take a tensor apart that nobody fills.
        whole = torch.empty(param.shape, dtype=torch.uint8, device="cpu")
        parts = found.build_fn(found.key, whole, found.replica_id, None)
        for part in nested_values(parts if isinstance(parts, dict | list) else [parts]):
            is_view = part.data.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            if not is_view or not part.data.is_contiguous():
                raise ValueError(
                    f"{part.key} is no run of elements of its parameter: what the optimizer keeps "
                    f"for it cannot be saved"
                )
            yield part, part.data.storage_offset()

    def frozen_keys(self) -> set[str]:
        """Keys of the weights that are not trained."""
        return {
            shard.key
            for ddp in self._job.ddps.values()
            for param in ddp.module.parameters()
            if not param.requires_grad and id(param) in self._weights
            for shard, _ in self.shards(param)
        }

    def problems(self) -> Iterator[str]:
        """Which parameters are tensor-parallel by their attributes, but replicas for Megatron."""
        for name, param, groups in self._replicated():
            tp = groups.expt_tp if ".experts." in name else groups.tp
            if getattr(param, "tensor_model_parallel", False) and tp.size() > 1:
                yield (
                    f"{name} is one of {tp.size()} tensor-parallel shards, but the module's "
                    f"sharded_state_dict calls it a replica, of which one would be kept: derive "
                    f"the module from MegatronModule and set its tp_group to pg_collection.tp"
                )

    def differing_replicas(self) -> list[str]:
        """Which parameters differ between ranks that hold the same of them.

        Collective in the groups of the modules. Compares one weighted sum of each. Data-parallel
        ranks get the same update; on tensor-parallel ones kernels may round otherwise, and copies
        drift apart a little in a long training, far less than shards differ.
        """
        tensor_parallel = {id(param) for _, param, _ in self._replicated()}
        found = []
        for module, ddp in self._job.ddps.items():
            groups = self._job.infra.pg_collections[module]
            assert groups is not None, f"a coordinator has refused {module!r} without groups"
            params = dict(ddp.module.named_parameters())
            dense = {name: each for name, each in params.items() if ".experts." not in name}
            copies = {name: each for name, each in dense.items() if id(each) in tensor_parallel}
            expert = {name: param for name, param in params.items() if name not in dense}
            for kind, alike, group, tolerance in (
                ("tensor-parallel", copies, groups.tp, DRIFT),
                ("data-parallel", dense, groups.dp_cp, ROUNDING),
                ("data-parallel", expert, groups.expt_dp if expert else None, ROUNDING),
            ):
                if alike and group is not None and group.size() > 1:
                    found += [
                        f"{name} of module {module!r} is not the same on the {kind} ranks "
                        f"{dist.get_process_group_ranks(group)}, of which one would be kept: where "
                        f"each has a shard, derive the module from MegatronModule and set its "
                        f"tp_group to pg_collection.tp; else start them alike"
                        for name in _differing(alike, group, tolerance)
                    ]
        return found

    def _replicated(self) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
        """(name, parameter, groups of its module) of those of which no dim is shared out."""
        for module, ddp in self._job.ddps.items():
            for name, param in ddp.module.named_parameters():
                if id(param) in self._weights and not any(
                    count > 1
                    for shard, _ in self.shards(param)
                    for count in (shard.axis_fragmentations or ())[shard.prepend_axis_num :]
                ):
                    groups = self._job.infra.pg_collections[module]
                    yield f"{name} of module {module!r}", param, groups

    def load_filled(self, objects: Mapping[str, Any]) -> None:
        """Make the model that of its chunks, which were filled, and of some of its objects."""
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedObject):
                each.data = objects.get(each.unique_key, each.data)
        state = dict_list_map_outplace(lambda each: each.data, self._sharded)
        merge(state, self._local)
        self._model.load_state_dict(apply_factory_merges(state, self._factories))


@torch.no_grad()
def _differing(
    params: Mapping[str, torch.nn.Parameter], group: dist.ProcessGroup, tolerance: float
) -> list[str]:
    """Names of those that differ on the ranks of a group. Collective in it."""
    sums = torch.stack([_weighted_sum(param) for param in params.values()])
    norms = torch.stack([param.detach().float().norm() for param in params.values()])
    extremes = torch.stack([sums, -sums, norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, least, norms = extremes[0], -extremes[1], extremes[2]
    rounding = [max(tolerance, 4 * torch.finfo(param.dtype).eps) for param in params.values()]
    differs = most - least > norms * norms.new_tensor(rounding)
    return [name for name, flag in zip(params, differs.tolist(), strict=True) if flag]


def _weighted_sum(param: torch.nn.Parameter) -> torch.Tensor:
    """A sum that is another one for most other values of a parameter, or for another order."""
    weights = torch.arange(param.numel(), dtype=torch.float32, device=param.device)
    return (param.detach().float().view(-1) * weights.cos_().add_(1.5)).sum()


@frozen(eq=False)
class Part:
    """What an optimizer keeps on this rank for one parameter.

    Args:
        param: the model's parameter.
        start: the first of its elements that are kept here, in memory order.
        stop: behind the last.
        tensors: what is kept for them, by name, each with ``stop - start`` elements.
        state: all that the optimizer keeps, its number of updates too.
    """

    param: torch.nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]
    state: dict[str, Any]


class OptimizerState:
    """What the optimizer of one module keeps on this rank.

    Args:
        name: the module.
        ddp: the module.
        optimizers: Megatron's optimizers of it: one for its dense weights, another for experts.
    """

    def __init__(self, name: str, ddp: DistributedDataParallel, optimizers: list[Any]) -> None:
        self.name = name
        params = [param for param in ddp.module.parameters() if param.requires_grad]
        self._optimizers = optimizers
        for optimizer in optimizers:
            _initialize(optimizer)
        self._parts = [(each, part) for each in optimizers for part in _parts(each, params)]

    @classmethod
    def collect(
        cls, optimizer: MimoOptimizer, ddps: Mapping[str, DistributedDataParallel]
    ) -> list["OptimizerState"]:
        """Those of all modules on this rank."""
        return [cls(name, ddp, inner_optimizers(optimizer, name)) for name, ddp in ddps.items()]

    def chunks(self, model: ModelState) -> Iterator[Chunk]:
        """All tensors, each a box of a whole tensor that is named after the weight's."""
        for optimizer, part in self._parts:
            for shard, begin in model.shards(part.param):
                yield from _chunks_of_part(
                    part, shard, begin, isinstance(optimizer, DistributedOptimizer)
                )

    def hand_back(self) -> None:
        """Give filled tensors to optimizers that had handed out copies of theirs."""
        for optimizer, part in self._parts:
            if optimizer.config.use_precision_aware_optimizer:
                tensors: dict[str, Any] = dict(part.tensors)
                tensors["param"] = tensors.pop("fp32_param", None)
                optimizer._set_main_param_and_optimizer_states(part.param, tensors)

    # -- what is no tensor -------------------------------------------------------------------------

    def settings(self, model: ModelState) -> dict[str, Any]:
        """Learning rates and the like, numbers of updates, the loss scale. JSON."""
        scale: Any = {}
        for optimizer in self._optimizers:
            if getattr(optimizer, "grad_scaler", None):
                state = optimizer.grad_scaler.state_dict()
                scale = {name: float(value) for name, value in state.items()}
        steps = {key: float(state["step"]) for key, state in self._counted(model)}
        groups = [_encoded(group) for group in self._groups()]
        return {"groups": groups, "steps": steps, "grad_scaler": scale}

    def unknown_groups(self, saved: Mapping[str, Any]) -> Iterator[str]:
        """Parameter groups here whose settings a checkpoint does not have."""
        for group in self._groups():
            here = _encoded(group)
            if _matching(here, saved["groups"]) is None:
                yield (
                    f"the optimizer of module {self.name!r} has the parameter group "
                    f"{_identity(here)}, but the checkpoint {list(map(_identity, saved['groups']))}"
                )

    def load_settings(self, saved: Mapping[str, Any], model: ModelState, fresh: set[str]) -> None:
        """Go on with the settings of a checkpoint.

        Args:
            saved: what :meth:`settings` said, of all ranks.
            model: the weights.
            fresh: keys of those whose state begins anew.
        """
        for group in self._groups():
            found = _matching(_encoded(group), saved["groups"]) or {}
            group |= {
                name: decode(value)
                for name, value in found.items()
                if name not in _identifier_keys()
            }
        for key, state in self._counted(model):
            steps = saved["steps"] if "steps" in saved else saved["scalars"].get("step", {})
            if key in fresh:
                state["step"] = _like(state["step"], 0)
            elif key in steps or "steps" not in saved:
                number = steps[key] if key in steps else decode(steps)
                state["step"] = _like(state["step"], number)
        for optimizer in self._optimizers:
            if getattr(optimizer, "grad_scaler", None) and saved["grad_scaler"]:
                state = optimizer.grad_scaler.state_dict()
                found = {name: saved["grad_scaler"][name] for name in state}
                optimizer.grad_scaler.load_state_dict(
                    {name: _like(value, found[name]) for name, value in state.items()}
                )

    def _counted(self, model: ModelState) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, state) of the weights of which an optimizer counts the updates."""
        for _, part in self._parts:
            if "step" in part.state:
                for shard, _ in model.shards(part.param):
                    yield shard.key, part.state

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Those that have parameters here."""
        for optimizer in self._optimizers:
            yield from (group for group in optimizer.optimizer.param_groups if group["params"])


def merge_settings(ranks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of one module's optimizer, from all of its ranks.

    A rank that keeps no state, or has no parameter of a group, knows less than others.
    """
    groups: dict[str, Any] = {}
    merged: dict[str, Any] = {"steps": {}, "grad_scaler": {}}
    for settings in ranks:
        for group in settings["groups"]:
            groups.setdefault(str(_identity(group)), group)
        for name, known in merged.items():
            merged[name] = {**settings[name], **known}
    return {"groups": list(groups.values()), **merged}


def inner_optimizers(optimizer: MimoOptimizer, name: str) -> list[Any]:
    """The optimizers of a module that hold parameters, on this rank."""
    info = optimizer.module_infos.get(name)
    if info is None or not info.is_active or info.optimizer is None:
        return []
    inner = getattr(info.optimizer, "chained_optimizers", [info.optimizer])
    return [each for each in inner if not getattr(each, "is_stub_optimizer", False)]


def optimizer_problems(optimizer: Any, names: list[str]) -> list[str]:
    """What keeps an optimizer from being saved or loaded."""
    if not isinstance(optimizer, MimoOptimizer):
        return [
            f"the optimizer is of class {type(optimizer).__name__}: give the MimoOptimizer that "
            f"coordinator.build_optimizer makes, or None for the weights alone"
        ]
    found = []
    for name in names:
        for each in inner_optimizers(optimizer, name):
            if not isinstance(each.optimizer, torch.optim.Optimizer) or hasattr(
                each.optimizer, "sub_optimizers"
            ):
                found.append(
                    f"the optimizer of module {name!r} is a {type(each.optimizer).__name__}, whose "
                    f"state does not fit a checkpoint; build it without optimizer_cpu_offload"
                )
    return found


def _initialize(optimizer: Any) -> None:
    """Make the state that the first update would make, which may come after a checkpoint."""
    inner = optimizer.optimizer
    if optimizer.init_state_fn is not None:
        optimizer.init_state_fn(inner, optimizer.config)
    for group in inner.param_groups:
        for param in group["params"]:
            state = inner.state[param]
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            elif isinstance(inner, torch.optim.SGD) and group["momentum"] and not state:
                state["momentum_buffer"] = torch.zeros_like(param)


def _parts(optimizer: Any, params: list[torch.nn.Parameter]) -> Iterator[Part]:
    """What an optimizer keeps for those of the parameters that are its own."""
    if isinstance(optimizer, DistributedOptimizer):
        for param in optimizer.model_param_group_index_map:
            found = dict(optimizer._get_main_param_and_optimizer_states(param))
            here = optimizer._get_model_param_range_map(param)["param"]
            main = found.pop("param")
            state = optimizer.optimizer.state.get(main, {})
            yield _part(param, here.start, here.end, main, found, state)
        return
    inner = optimizer.optimizer
    for param in params:
        main = getattr(param, "main_param", param)
        if main in inner.state:
            yield _part(param, 0, param.numel(), main, inner.state[main], inner.state[main])


def _part(
    param: torch.nn.Parameter,
    start: int,
    stop: int,
    main: torch.Tensor,
    kept: Mapping[str, Any],
    state: dict[str, Any],
) -> Part:
    tensors = {
        name: value
        for name, value in kept.items()
        if torch.is_tensor(value) and value.numel() == stop - start and name != "step"
    }
    if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
        tensors["fp32_param"] = main
    return Part(param, start, stop, tensors, state)


def _chunks_of_part(part: Part, shard: ShardedTensor, begin: int, sharded: bool) -> Iterator[Chunk]:
    """What is kept for the elements of a parameter that belong to one whole tensor."""
    numel = shard.data.numel()
    first, last = max(part.start, begin), min(part.stop, begin + numel)
    writes = _is_first_copy(shard.replica_id) if sharded else is_main_replica(shard.replica_id)
    added = tuple(shard.global_offset[: shard.prepend_axis_num])
    at = first - part.start
    for box in boxes_of_range(tuple(shard.local_shape), first - begin, last - begin):
        offset = (
            *added,
            *map(sum, zip(shard.global_offset[len(added) :], box.offset, strict=True)),
        )
        size = (*(1 for _ in added), *box.size)
        for name, tensor in part.tensors.items():
            yield Chunk(
                key=f"optimizer.state.{name}.{shard.key}",
                shape=tuple(shard.global_shape),
                box=Box(offset, size),
                data=tensor.detach().view(-1)[at : at + box.volume],
                writes=writes,
                padded_for=_padded_for(shard),
                weight=shard.key,
            )
        at += box.volume


def _is_first_copy(replica_id: Any) -> bool:
    """Whether no other rank but data-parallel ones, which keep other elements, holds a weight.

    Megatron numbers copies by (pipeline stage, tensor-parallel rank, data-parallel rank).
    """
    return isinstance(replica_id, int) or not any(replica_id[:-1])


def _padded_for(shard: ShardedTensor) -> int:
    """TP, of what Megatron pads to a multiple of it."""
    return int(shard.axis_fragmentations[0]) if shard.allow_shape_mismatch else 0


def _box(shard: ShardedTensor) -> Box:
    size = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
    return Box(shard.global_offset, size)


def _like(old: Any, value: Any) -> Any:
    """A number in the form that it had."""
    return torch.full_like(old, float(value)) if torch.is_tensor(old) else type(old)(value)


def _encoded(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {
        name: encode(value, where=f"a parameter group's {name}")
        for name, value in group.items()
        if name != "params"
    }


def _identifier_keys() -> tuple[str, ...]:
    """The settings by which Megatron tells parameter groups apart."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return tuple(param_group_identifier_keys)


def _identity(group: Mapping[str, Any]) -> dict[str, Any]:
    """By what Megatron tells parameter groups apart."""
    return {name: group[name] for name in _identifier_keys() if group.get(name) is not None}


def _matching(
    group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The group of a checkpoint that is this one, though layout and schedule may have changed."""
    here = _identity(group)
    for ignored in ((), _SCHEDULE, (*_SCHEDULE, *_LAYOUT)):
        kind = {name: value for name, value in here.items() if name not in ignored}
        alike = [each for each in saved if kind.items() <= _identity(each).items()]
        if len(alike) == 1:
            return alike[0]
    return None
