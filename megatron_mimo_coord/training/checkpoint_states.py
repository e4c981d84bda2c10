"""What a checkpoint holds of a training: every weight, and what the optimizer keeps for it.

Megatron's ``sharded_state_dict`` says which part of which whole tensor each weight is. What the
optimizer keeps for a weight lies where the weight lies: with the distributed optimizer each replica
has a range of its elements, which it writes and reads by itself. So nothing is gathered, and what
was written fits every layout, with the distributed optimizer or without.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from attrs import frozen
from megatron.core import parallel_state
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
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model

from megatron_mimo_coord.training.boxes import Box, boxes_of_range
from megatron_mimo_coord.training.checkpoint_tensors import Chunk, ChunkReader
from megatron_mimo_coord.training.plain_data import decode, encode

_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")  # a resumed training may have others
_LAYOUT = ("is_expert_parallel",)  # where experts are on several ranks


class ModelState:
    """The weights and buffers of the modules on this rank.

    Args:
        model: whose ``sharded_state_dict`` says where each weight lies in the whole model.
    """

    def __init__(self, model: MimoModel) -> None:
        self._model = model
        with _rank_for_tied_embeddings(model):
            sharded = model.sharded_state_dict()
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

    def load(self, reader: ChunkReader) -> None:
        """Fill the model from a checkpoint that has all it needs."""
        for chunk in self.chunks():
            reader.fill(chunk)
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedObject):
                each.data = reader.object(each.unique_key)
        state = dict_list_map_outplace(lambda each: each.data, self._sharded)
        merge(state, self._local)
        self._model.load_state_dict(apply_factory_merges(state, self._factories))


@contextmanager
def _rank_for_tied_embeddings(model: MimoModel) -> Iterator[None]:
    """Tell Megatron the language model's data-parallel rank, which its tied embeddings ask for.

    They ask ``parallel_state`` and not the model's own groups; with grids there is none.
    """
    groups = getattr(unwrap_model(model.language_model), "pg_collection", None)
    if groups is None or parallel_state.model_parallel_is_initialized():
        yield
        return
    parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(None)


@frozen(eq=False)
class Part:
    """What an optimizer keeps on this rank for one parameter.

    Args:
        param: the model's parameter.
        start: the first of its elements that are kept here, in memory order.
        stop: behind the last.
        tensors: what is kept for them, by name, each with ``stop - start`` elements.
    """

    param: torch.nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]


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

    def settings(self) -> dict[str, Any]:
        """Learning rates and the like, numbers of updates, the loss scale. JSON."""
        scalars: dict[str, Any] = {}
        scale: Any = {}
        for optimizer in self._optimizers:
            for _, name, value in islice(_scalars(optimizer), 1):  # all are alike
                scalars[name] = encode(value)
            if getattr(optimizer, "grad_scaler", None):
                scale = encode(dict(optimizer.grad_scaler.state_dict()))
        groups = [_encoded(group) for group in self._groups()]
        return {"groups": groups, "scalars": scalars, "grad_scaler": scale}

    def problems(self, saved: Mapping[str, Any] | None) -> Iterator[str]:
        """Why this optimizer cannot go on from the settings of a checkpoint."""
        if saved is None:
            yield f"the checkpoint has no optimizer of module {self.name!r}"
            return
        for group in self._groups():
            here = _encoded(group)
            if group["params"] and _matching(here, saved["groups"]) is None:
                yield (
                    f"the optimizer of module {self.name!r} has the parameter group "
                    f"{_identity(here)}, but the checkpoint {list(map(_identity, saved['groups']))}"
                )

    def load_settings(self, saved: Mapping[str, Any]) -> None:
        """Go on with the settings of a checkpoint."""
        for group in self._groups():
            found = _matching(_encoded(group), saved["groups"]) or {}
            group |= {
                name: decode(value)
                for name, value in found.items()
                if name not in _identifier_keys()
            }
        for optimizer in self._optimizers:
            for state, name, value in list(_scalars(optimizer)):
                if name in saved["scalars"]:
                    state[name] = _like(value, decode(saved["scalars"][name]))
            if getattr(optimizer, "grad_scaler", None) and saved["grad_scaler"]:
                optimizer.grad_scaler.load_state_dict(decode(saved["grad_scaler"]))

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.optimizer.param_groups


def merge_settings(ranks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of one module's optimizer, from all of its ranks.

    A rank that keeps no state, or has no parameter of a group, knows less than others.
    """
    groups: dict[str, Any] = {}
    merged: dict[str, Any] = {"scalars": {}, "grad_scaler": {}}
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
            yield _part(param, here.start, here.end, found.pop("param"), found)
        return
    inner = optimizer.optimizer
    for param in params:
        main = getattr(param, "main_param", param)
        if main in inner.state:
            yield _part(param, 0, param.numel(), main, inner.state[main])


def _part(
    param: torch.nn.Parameter, start: int, stop: int, main: torch.Tensor, state: Mapping[str, Any]
) -> Part:
    tensors = {
        name: value
        for name, value in state.items()
        if torch.is_tensor(value) and value.numel() == stop - start and name != "step"
    }
    if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
        tensors["fp32_param"] = main
    return Part(param, start, stop, tensors)


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


def _scalars(optimizer: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(state, name, value) of the numbers of updates that an optimizer keeps for a parameter."""
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            yield state, "step", state["step"]


def _like(old: Any, value: Any) -> Any:
    """A number in the form that it had."""
    return torch.full_like(old, float(value)) if torch.is_tensor(old) else value


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
