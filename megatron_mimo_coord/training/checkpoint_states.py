"""What a checkpoint holds of an optimizer: what is kept for each weight, and settings.

What the optimizer keeps for a weight lies where the weight lies: with the distributed optimizer
each replica has a range of its elements, which it writes and reads by itself. So nothing is
gathered, and what was written fits every layout, with the distributed optimizer or without.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.optimizer import MimoOptimizer

from megatron_mimo_coord.megatron.checkpoints import Chunk, ShardedWeights
from megatron_mimo_coord.megatron.optimizer_states import (
    ModuleOptimizerState,
    identifier_keys,
    like,
)
from megatron_mimo_coord.training.plain_data import decode, encode

Settings = dict[str, Any]
"""Of a module's optimizer, what is no tensor: groups, numbers of updates, the loss scale. JSON."""

NO_SETTINGS: Settings = {"groups": [], "steps": {}, "grad_scaler": {}}

_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")  # a resumed training may have others
_LAYOUT = ("is_expert_parallel",)  # where experts are on several ranks


class OptimizerStates:
    """What an optimizer keeps on this rank, module by module.

    Args:
        optimizer: the ``MimoOptimizer``; None for nothing.
        ddps: the modules on this rank.
        weights: where their weights lie.
    """

    def __init__(
        self,
        optimizer: MimoOptimizer | None,
        ddps: Mapping[str, DistributedDataParallel],
        weights: ShardedWeights,
    ) -> None:
        self._weights = weights
        self._modules = [
            ModuleOptimizerState(optimizer, name, ddp)
            for name, ddp in (ddps.items() if optimizer is not None else ())
        ]

    def chunks(self) -> list[Chunk]:
        """All tensors, each a box of a whole tensor that is named after the weight's."""
        return [
            chunk
            for module in self._modules
            for kept in module.kept
            for chunk in self._weights.chunks_beside(
                kept.param, kept.start, kept.tensors, alone=kept.is_range
            )
        ]

    def settings(self) -> dict[str, Settings]:
        """Of each module."""
        return {
            module.name: {
                "groups": [_encoded(group) for group in module.groups()],
                "steps": {key: float(state["step"]) for key, state in self._counted(module)},
                "grad_scaler": module.loss_scale(),
            }
            for module in self._modules
        }

    def unknown_groups(self, saved: Mapping[str, Settings]) -> Iterator[str]:
        """Parameter groups here whose settings a checkpoint does not have."""
        for module in self._modules:
            groups = saved.get(module.name, NO_SETTINGS)["groups"]
            for here in map(_encoded, module.groups()):
                if _matching(here, groups) is None:
                    yield (
                        f"the optimizer of module {module.name!r} has the parameter group "
                        f"{_identity(here)}, but the checkpoint {list(map(_identity, groups))}"
                    )

    def load_filled(
        self, saved: Mapping[str, Settings], fresh: set[str], name_there: Callable[[str], str]
    ) -> None:
        """Go on with chunks that were filled, and with the settings of a checkpoint.

        Args:
            saved: what :meth:`settings` said, of all ranks.
            fresh: keys of the weights whose state begins anew.
            name_there: what the checkpoint calls a weight.
        """
        for module in self._modules:
            module.hand_back()
            settings = saved.get(module.name, NO_SETTINGS)
            for group in module.groups():
                found = _matching(_encoded(group), settings["groups"]) or {}
                stays = identifier_keys()
                group |= {name: decode(value) for name, value in found.items() if name not in stays}
            for key, state in self._counted(module):
                number = 0 if key in fresh else settings["steps"].get(name_there(key))
                if number is not None:
                    state["step"] = like(state["step"], number)
            module.load_loss_scale(settings["grad_scaler"])

    def _counted(self, module: ModuleOptimizerState) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, state) of the weights of which an optimizer counts the updates."""
        for kept in module.kept:
            if "step" in kept.state:
                for key in self._weights.keys(kept.param):
                    yield key, kept.state


def merge_settings(ranks: Sequence[Mapping[str, Settings]]) -> dict[str, Settings]:
    """The settings of each module's optimizer, from all of its ranks.

    A rank that keeps no state, or has no parameter of a group, knows less than others.
    """
    merged: dict[str, Settings] = {}
    for name, settings in (pair for rank in ranks for pair in rank.items()):
        known = merged.setdefault(name, deepcopy(NO_SETTINGS))
        for group in settings["groups"]:
            if _identity(group) not in map(_identity, known["groups"]):
                known["groups"].append(group)
        known["steps"] = settings["steps"] | known["steps"]
        known["grad_scaler"] = settings["grad_scaler"] | known["grad_scaler"]
    return merged


def _encoded(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {
        name: encode(value, where=f"a parameter group's {name}")
        for name, value in group.items()
        if name != "params"
    }


def _identity(group: Mapping[str, Any]) -> dict[str, Any]:
    """By what Megatron tells parameter groups apart."""
    return {name: group[name] for name in identifier_keys() if group.get(name) is not None}


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
