"""Where Megatron's ``sharded_state_dict`` says that each weight lies in its whole tensor.

Leans on it being asked of each module by itself, with the process groups that ``MimoModel`` would
take from the module: a module that carries none asks ``parallel_state``, which for its time has the
groups of the module's own grid. Layers are named by their number (``non_homogeneous_layers``), so
that they may differ in what they hold and in what is trained; stacked ones may not.

Whole tensors are named as in bare modules, whatever is around them here:
``language_model.decoder.layers.1.mlp.linear_fc1.weight``.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import sharded_state_dict_default

_LAYER = re.compile(r"(?<=\.)(layers\.\d+)(?=\.)")
_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")


def sharded_state_dict(
    model: MimoModel,
    pg_collections: Mapping[str, ProcessGroupCollection | None],
    language: str,
    stacked: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What Megatron says of every weight on this rank, by the keys of ``model.state_dict()``.

    Args:
        model: the model.
        pg_collections: process groups of the modules on this rank.
        language: name of the language model among them.
        stacked: whether equal layers are one tensor, as in checkpoints of format 1.

    Returns:
        That, and for the key of each tensor its name in the whole model: norms have the keys that
        they would have if they were fused into the layer behind them, and experts share a tensor.
    """
    here = {name: f"modality_submodules.{name}" for name in model.modality_submodules}
    if model.language_model is not None:
        here[language] = "language_model"
    sharded: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, path in here.items():
        groups = pg_collections[name]
        assert groups is not None, f"the coordinator has refused {name!r} without groups"
        module, prefix = model.get_submodule(path), f"{path}."
        while isinstance(module, DistributedDataParallel | Float16Module):
            module, prefix = module.module, f"{prefix}module."
        metadata = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": not stacked}
        with _groups_in_parallel_state(groups):
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


@contextmanager
def _groups_in_parallel_state(groups: ProcessGroupCollection) -> Iterator[None]:
    """Have ``parallel_state`` answer with the groups of a module, whatever it knows."""
    answers = {
        "_TENSOR_MODEL_PARALLEL_GROUP": groups.tp,
        "_MPU_TENSOR_MODEL_PARALLEL_RANK": groups.tp.rank(),
        "_PIPELINE_MODEL_PARALLEL_GROUP": groups.pp,
        "_MPU_PIPELINE_MODEL_PARALLEL_RANK": groups.pp.rank(),
        "_DATA_PARALLEL_GROUP_WITH_CP": groups.dp_cp,
        "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": groups.dp_cp,
        "_MPU_DATA_PARALLEL_RANK": groups.dp_cp.rank(),
    }
    before = {name: getattr(parallel_state, name) for name in answers}
    for name, group in answers.items():
        setattr(parallel_state, name, group)
    try:
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)
