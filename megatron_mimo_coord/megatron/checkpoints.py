"""Where Megatron's ``sharded_state_dict`` says that each weight lies in its whole tensor.

Leans on it being asked of each module by itself, with the process groups that ``MimoModel`` would
take from the module: a module that carries none asks ``parallel_state``, which for its time has the
groups of the module's own grid. Layers are named by their number (``non_homogeneous_layers``), so
that they may differ in what they hold and in what is trained; stacked ones may not. Some weights it
takes apart, such as the halves of a gated MLP, and puts together again when they are loaded. Copies
are numbered by (pipeline stage, tensor-parallel rank, data-parallel rank).

Whole tensors are named as in bare modules, whatever is around them here:
``language_model.decoder.layers.1.mlp.linear_fc1.weight``.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.boxes import Box, boxes_of_range
from megatron_mimo_coord.megatron.changes import Changes

_LAYER = re.compile(r"(?<=\.)(layers\.\d+)(?=\.)")
_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")


@frozen(eq=False)
class Chunk:
    """The part of a whole tensor that a rank holds.

    Args:
        key: name of the whole tensor, the same on every layout.
        shape: of the whole tensor.
        box: which part this is.
        data: the part, in any shape with its number of elements.
        writes: whether this rank writes it; others hold the same.
        padded_for: TP, of a tensor whose first dim is padded to a multiple of it, as embeddings
            are: it may have another size on another TP. What the file lacks becomes zero.
        weight: of what an optimizer keeps for one, the key of the weight.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    data: torch.Tensor
    writes: bool = True
    padded_for: int = 0
    weight: str = ""

    @property
    def dtype(self) -> str:
        """Name of the data type, such as ``float32``."""
        return str(self.data.dtype).removeprefix("torch.")

    def copied(self) -> "Chunk":
        """With a copy of the data in host memory, complete once the GPU has come this far."""
        pinned = self.data.is_cuda
        host = torch.empty(self.data.shape, dtype=self.data.dtype, pin_memory=pinned, device="cpu")
        return evolve(self, data=host.copy_(self.data.detach(), non_blocking=True))


class ShardedWeights:
    """The weights and buffers of a model's modules on this rank.

    Args:
        model, pg_collections: the modules on this rank, and their process groups.
        stacked: whether equal layers are one tensor, as Megatron's trainers may have them.

    Attributes:
        names: for the key of each tensor here, what the whole bare model's ``state_dict`` calls it:
            norms have the keys that they would have if they were fused into the layer behind them,
            and experts share a tensor.
    """

    def __init__(
        self,
        model: MimoModel,
        pg_collections: Mapping[str, ProcessGroupCollection | None],
        stacked: bool = False,
    ) -> None:
        self._model = model
        sharded, self.names = _sharded_state_dict(model, pg_collections, stacked)
        self._of_param = {
            id(each.data): each
            for each in nested_values(sharded)
            if isinstance(each, ShardedTensor | ShardedTensorFactory)
        }
        self._sharded, self._local, self._factories = load_preprocess(sharded)

    def chunks(self) -> list[Chunk]:
        """All tensors of this rank."""
        return [_chunk(x) for x in nested_values(self._sharded) if isinstance(x, ShardedTensor)]

    def objects(self) -> Iterator[tuple[str, Any, bool]]:
        """(key, object, whether this rank writes it) of what modules keep beside tensors.

        Transformer Engine's do, for fp8.
        """
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedObject):
                yield each.unique_key, each.data, is_main_replica(each.replica_id)

    def keys(self, param: torch.nn.Parameter) -> list[str]:
        """Those of the whole tensors that a parameter is made of.

        Raises:
            KeyError: the parameter is not in the model's ``sharded_state_dict``.
        """
        return [shard.key for shard, _ in self._shards(param)]

    def is_replicated(self, param: torch.nn.Parameter) -> bool:
        """Whether a parameter is in the ``sharded_state_dict``, and no dim of it is shared out."""
        return id(param) in self._of_param and not any(
            count > 1
            for shard, _ in self._shards(param)
            for count in (shard.axis_fragmentations or ())[shard.prepend_axis_num :]
        )

    def frozen_keys(self) -> set[str]:
        """Keys of the weights that are not trained."""
        frozen = [param for param in self._model.parameters() if not param.requires_grad]
        return {key for p in frozen if id(p) in self._of_param for key in self.keys(p)}

    def chunks_beside(
        self,
        param: torch.nn.Parameter,
        start: int,
        tensors: Mapping[str, torch.Tensor],
        alone: bool,
    ) -> Iterator[Chunk]:
        """What is kept beside some of a parameter's elements, as boxes of whole tensors.

        Args:
            param: the parameter.
            start: the first of its elements, in memory order.
            tensors: what is kept, by name, each with a number for each of the elements.
            alone: whether data-parallel ranks keep other elements.
        """
        stop = start + max((tensor.numel() for tensor in tensors.values()), default=0)
        for shard, begin in self._shards(param):
            weight = _chunk(shard)
            if alone:
                writes = isinstance(shard.replica_id, int) or not any(shard.replica_id[:-1])
                weight = evolve(weight, writes=writes)
            first, last = max(start, begin), min(stop, begin + shard.data.numel())
            added, at = tuple(shard.global_offset[: shard.prepend_axis_num]), first - start
            for box in boxes_of_range(tuple(shard.local_shape), first - begin, last - begin):
                starts = zip(shard.global_offset[len(added) :], box.offset, strict=True)
                whole = Box((*added, *map(sum, starts)), (*(1 for _ in added), *box.size))
                for name, tensor in tensors.items():
                    data = tensor.detach().view(-1)[at : at + box.volume]
                    key = f"optimizer.state.{name}.{shard.key}"
                    yield evolve(weight, key=key, box=whole, data=data, weight=shard.key)
                at += box.volume

    def _shards(self, param: torch.nn.Parameter) -> Iterator[tuple[ShardedTensor, int]]:
        """The parts of whole tensors that a parameter is made of, and at which element each begins.

        One part, but for those that Megatron takes apart.
        """
        found = self._of_param[id(param)]
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

    def load_filled(self, objects: Mapping[str, Any]) -> None:
        """Make the model that of its shards, which were filled, and of some of its objects."""
        for each in nested_values(self._sharded):
            if isinstance(each, ShardedObject):
                each.data = objects.get(each.unique_key, each.data)
        state = dict_list_map_outplace(lambda each: each.data, self._sharded)
        merge(state, self._local)
        self._model.load_state_dict(apply_factory_merges(state, self._factories))


def _chunk(shard: ShardedTensor) -> Chunk:
    added = (1,) * shard.prepend_axis_num  # dims of the whole tensor: layers or experts as one
    return Chunk(
        key=shard.key,
        shape=tuple(shard.global_shape),
        box=Box(shard.global_offset, (*added, *shard.local_shape)),
        data=shard.data.detach(),
        writes=is_main_replica(shard.replica_id),
        padded_for=int(shard.axis_fragmentations[0]) if shard.allow_shape_mismatch else 0,
    )


def declare_format(folder: Path) -> str:
    """Say in a file that a folder is what ``dist_checkpointing.load`` reads; returns its name."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return "metadata.json"


def _sharded_state_dict(
    model: MimoModel,
    pg_collections: Mapping[str, ProcessGroupCollection | None],
    stacked: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What Megatron says of every weight, by the keys of ``model.state_dict()``; names of keys."""
    here = {name: f"modality_submodules.{name}" for name in model.modality_submodules}
    if model.language_model is not None:
        here[LANGUAGE] = "language_model"
    sharded: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, path in here.items():
        groups = pg_collections[name]
        assert groups is not None, f"the coordinator has refused {name!r} without groups"
        module, prefix = model.get_submodule(path), f"{path}."
        while isinstance(module, DistributedDataParallel | Float16Module):
            module, prefix = module.module, f"{prefix}module."
        metadata = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": not stacked}
        with Changes() as changes:
            for attribute, answer in _answers(groups).items():
                getattr(parallel_state, attribute)  # is missed here if it is gone
                changes.set(parallel_state, attribute, answer)
            found = sharded_state_dict_default(
                module, prefix, metadata=metadata, tp_group=groups.tp
            )
        for name, each in found.items():
            if hasattr(each, "key"):
                each.key = f"{path}.{each.key.removeprefix(prefix)}"
                names[each.key] = _whole_name(f"{path}.{name.removeprefix(prefix)}", each.key)
        sharded |= found
    return sharded, names


def _whole_name(name: str, key: str) -> str:
    """The name of a weight in the whole model, whose layers its key has counted."""
    numbers = iter(_LAYER.split(key)[1::2])
    return _EXPERT.sub(".experts.", _LAYER.sub(lambda found: next(numbers, found[0]), name))


def _answers(groups: ProcessGroupCollection) -> dict[str, Any]:
    """What ``parallel_state`` is to answer for a module, whatever it knows."""
    return {
        "_TENSOR_MODEL_PARALLEL_GROUP": groups.tp,
        "_MPU_TENSOR_MODEL_PARALLEL_RANK": groups.tp.rank(),
        "_PIPELINE_MODEL_PARALLEL_GROUP": groups.pp,
        "_MPU_PIPELINE_MODEL_PARALLEL_RANK": groups.pp.rank(),
        "_DATA_PARALLEL_GROUP_WITH_CP": groups.dp_cp,
        "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": groups.dp_cp,
        "_MPU_DATA_PARALLEL_RANK": groups.dp_cp.rank(),
    }
