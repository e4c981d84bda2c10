"""What a checkpoint holds of a training: every weight, and what Adam keeps for it.

All of it is written with Megatron's distributed checkpointing, each tensor with its place in the
whole model, so that it can be read on any layout.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # its state fits any layout


def save(model: MimoModel, optimizer: MimoOptimizer, folder: Path) -> None:
    """Write weights and optimizer state into a folder, each rank its part. Collective."""
    updates = max(count_updates(adam) for _, adam in optimizers(optimizer))
    state = {**sharded_state(model, optimizer), "updates": updates}
    dist_checkpointing.save(state, str(folder), InProcessWriter())


def load(model: MimoModel, optimizer: MimoOptimizer, folder: Path) -> None:
    """Go on from what :func:`save` wrote, on this layout or another. Collective."""
    state = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(folder))
    model.load_state_dict(state["model"])
    for name, adam in optimizers(optimizer):
        load_adam(adam, state["optimizer"][name], state["updates"])


def sharded_state(
    model: MimoModel, optimizer: MimoOptimizer, is_loading: bool = False
) -> dict[str, Any]:
    """Every tensor of this rank, with its place in the whole model.

    Megatron has more in an optimizer's state, but takes it from the first rank, which may not
    have the module. It all follows from the options, but for the number of updates.
    """
    of_model = model.sharded_state_dict(metadata=SHARDING)
    found = optimizer.sharded_state_dict(of_model, is_loading, metadata=SHARDING)
    of_optimizer = {}
    for name, adam in optimizers(optimizer):
        key = "param_state" if isinstance(adam, DistributedOptimizer) else "state"
        of_optimizer[name] = found[name][key]
        of_optimizer[name].pop("common_step", None)
    return {"model": of_model, "optimizer": of_optimizer}


def optimizers(optimizer: MimoOptimizer) -> Iterator[tuple[str, MegatronOptimizer]]:
    """Name and optimizer of each module on this rank."""
    for name, info in optimizer.module_infos.items():
        if info.is_active:
            (only,) = info.optimizer.chained_optimizers  # experts would have a second one
            yield name, only


class InProcessWriter(TorchDistSaveShardedStrategy):
    """Writes Megatron's format from this process, with PyTorch's own writer.

    Megatron's writer starts a helper process on each rank, which outlives a rank that is killed.
    """

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str) -> None:
        """Write what this rank is the first to hold. Collective."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


def start_adam(optimizer: MimoOptimizer) -> None:
    """Make Adam's state now: its first update would, but may come after a checkpoint."""
    for _, adam in optimizers(optimizer):
        for group in adam.optimizer.param_groups:
            for param in group["params"]:
                adam.optimizer.state[param] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def count_updates(optimizer: MegatronOptimizer) -> int:
    """How often Adam has changed the weights; fewer times than there were steps, if some failed."""
    return max(int(state["step"]) for state in optimizer.optimizer.state.values())


def load_adam(optimizer: MegatronOptimizer, tensors: dict[Any, Any], updates: int) -> None:
    """Give Adam the state of a checkpoint."""
    step = torch.tensor(float(updates))
    if not isinstance(optimizer, DistributedOptimizer):
        tensors["common_step"] = step
        optimizer.load_state_dict({**optimizer.state_dict(), "state": tensors})
        return
    states = optimizer.optimizer.state.values()
    for state in states:
        del state["step"]  # or Megatron misses it among the tensors of the checkpoint
    optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for state in states:
        state["step"] = step.clone()
