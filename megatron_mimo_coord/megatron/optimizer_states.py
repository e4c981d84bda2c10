"""What Megatron's optimizers keep: moments, fp32 copies, numbers of updates, settings, loss scales.

What one keeps for a weight lies where the weight lies: with the distributed optimizer each replica
has a range of its elements, which it writes and reads by itself. So nothing is gathered, and what
was written fits every layout, with the distributed optimizer or without.

Leans on ``DistributedOptimizer`` telling which elements of a parameter it keeps something for, and
handing that out, or copies of it, by ``_get_main_param_and_optimizer_states``; on other optimizers
keeping it in PyTorch's, under the parameter or its ``main_param``; on ``init_state_fn`` making what
the first update would make; and on the settings by which Megatron tells parameter groups apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from attrs import frozen
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mimo_coord.megatron.checkpoints import Chunk, ShardedWeights
from megatron_mimo_coord.megatron.optimizers import optimizers_here

Settings = dict[str, Any]
"""Of a module's optimizers, what is no tensor: groups, numbers of updates, the loss scale."""

_NO_SETTINGS: Settings = {"groups": [], "steps": {}, "grad_scaler": {}}
_SCHEDULE = ("start_wd", "end_wd", "max_lr", "min_lr")  # a resumed training may have others
_LAYOUT = ("is_expert_parallel",)  # where experts are on several ranks


@frozen(eq=False)
class _Kept:
    """What an optimizer keeps on this rank for one parameter.

    Args:
        optimizer: Megatron's.
        param: the model's parameter.
        start: the first of its elements that are kept here, in memory order.
        tensors: what is kept for them, by name, each with a number for each.
        state: all that the optimizer keeps, its number of updates too.
    """

    optimizer: Any
    param: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class OptimizerStates:
    """What an optimizer keeps on this rank, or would keep after its first update."""

    def __init__(
        self,
        optimizer: MimoOptimizer | None,
        ddps: Mapping[str, DistributedDataParallel],
        weights: ShardedWeights,
    ) -> None:
        self._weights = weights
        self._optimizers: dict[str, list[Any]] = {}
        self._kept: dict[str, list[_Kept]] = {}
        for name, ddp in ddps.items() if optimizer is not None else ():
            inner = self._optimizers[name] = _inner_optimizers(optimizer, name)
            params = [param for param in ddp.module.parameters() if param.requires_grad]
            for each in inner:
                _initialize(each)
            self._kept[name] = [kept for each in inner for kept in _kept(each, params)]

    def chunks(self) -> list[Chunk]:
        """All tensors, each a box of a whole tensor that is named after the weight's."""
        return [
            chunk
            for module in self._kept.values()
            for kept in module
            for chunk in self._weights.chunks_beside(
                kept.param,
                kept.start,
                kept.tensors,
                alone=isinstance(kept.optimizer, DistributedOptimizer),
            )
        ]

    def settings(self) -> dict[str, Settings]:
        """Of each module."""
        return {
            name: {
                "groups": [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in self._groups(name)
                ],
                "steps": {key: float(state["step"]) for key, state in self._counted(name)},
                "grad_scaler": {
                    key: float(value)
                    for scaler in self._scalers(name)
                    for key, value in scaler.state_dict().items()
                },
            }
            for name in self._optimizers
        }

    def unknown_groups(self, saved: Mapping[str, Settings]) -> Iterator[str]:
        """Parameter groups here whose settings a checkpoint does not have."""
        for name in self._optimizers:
            groups = saved.get(name, _NO_SETTINGS)["groups"]
            for group in self._groups(name):
                if _matching(group, groups) is None:
                    yield (
                        f"the optimizer of module {name!r} has the parameter group "
                        f"{_identity(group)}, but the checkpoint {list(map(_identity, groups))}"
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
        for name, module in self._kept.items():
            for kept in module:
                if kept.optimizer.config.use_precision_aware_optimizer:  # it had handed out copies
                    tensors: dict[str, Any] = dict(kept.tensors)
                    tensors["param"] = tensors.pop("fp32_param", None)
                    kept.optimizer._set_main_param_and_optimizer_states(kept.param, tensors)
            settings = deepcopy(saved.get(name, _NO_SETTINGS))
            for group in self._groups(name):
                found = _matching(group, settings["groups"]) or {}
                stays = _identifier_keys()
                group |= {key: value for key, value in found.items() if key not in stays}
            for key, state in self._counted(name):
                number = 0 if key in fresh else settings["steps"].get(name_there(key))
                if number is not None:
                    state["step"] = _like(state["step"], number)
            scale = settings["grad_scaler"]
            for scaler in self._scalers(name) if scale else ():
                state = scaler.state_dict()
                scaler.load_state_dict({k: _like(value, scale[k]) for k, value in state.items()})

    def _groups(self, name: str) -> Iterator[dict[str, Any]]:
        """Those of a module that have parameters here."""
        for each in self._optimizers[name]:
            yield from (group for group in each.optimizer.param_groups if group["params"])

    def _scalers(self, name: str) -> list[Any]:
        found = [getattr(each, "grad_scaler", None) for each in self._optimizers[name]]
        return [scaler for scaler in found if scaler]

    def _counted(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, state) of the weights of which an optimizer counts the updates."""
        for kept in self._kept[name]:
            if "step" in kept.state:
                for key in self._weights.keys(kept.param):
                    yield key, kept.state


def merge_settings(ranks: Sequence[Mapping[str, Settings]]) -> dict[str, Settings]:
    """The settings of each module's optimizers, from all of its ranks.

    A rank that keeps no state, or has no parameter of a group, knows less than others.
    """
    merged: dict[str, Settings] = {}
    for name, settings in (pair for rank in ranks for pair in rank.items()):
        known = merged.setdefault(name, deepcopy(_NO_SETTINGS))
        for group in settings["groups"]:
            if _identity(group) not in map(_identity, known["groups"]):
                known["groups"].append(group)
        known["steps"] = settings["steps"] | known["steps"]
        known["grad_scaler"] = settings["grad_scaler"] | known["grad_scaler"]
    return merged


def optimizer_problems(optimizer: Any, names: list[str]) -> list[str]:
    """What keeps an optimizer from being saved or loaded."""
    if not isinstance(optimizer, MimoOptimizer):
        return [
            f"the optimizer is of class {type(optimizer).__name__}: give the MimoOptimizer that "
            f"coordinator.build_optimizer makes, or None for the weights alone"
        ]
    inner = [
        (name, each.optimizer) for name in names for each in _inner_optimizers(optimizer, name)
    ]
    return [
        f"the optimizer of module {name!r} is a {type(each).__name__}, whose state does not fit a "
        f"checkpoint; build it without optimizer_cpu_offload"
        for name, each in inner
        if not isinstance(each, torch.optim.Optimizer) or hasattr(each, "sub_optimizers")
    ]


def _identifier_keys() -> tuple[str, ...]:
    """The settings by which Megatron tells parameter groups apart."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return tuple(param_group_identifier_keys)


def _identity(group: Mapping[str, Any]) -> dict[str, Any]:
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


def _like(old: Any, value: Any) -> Any:
    """A number in the form that it had."""
    return torch.full_like(old, float(value)) if torch.is_tensor(old) else type(old)(value)


def _inner_optimizers(optimizer: Any, name: str) -> list[Any]:
    """Of a module, one for its dense weights and one for experts, if they have parameters here."""
    found = optimizers_here(optimizer).get(name)
    inner = getattr(found, "chained_optimizers", [found])
    return [each for each in inner if each and not getattr(each, "is_stub_optimizer", False)]


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


def _kept(optimizer: Any, params: list[torch.nn.Parameter]) -> Iterator[_Kept]:
    """What an optimizer keeps for those of the parameters that are its own.

    Of what is kept, what has a number for each element; and what is updated, if it is a copy.
    """
    states = optimizer.optimizer.state
    is_distributed = isinstance(optimizer, DistributedOptimizer)
    for param in optimizer.model_param_group_index_map if is_distributed else params:
        main, start, elements = getattr(param, "main_param", param), 0, param.numel()
        if is_distributed:
            found = dict(optimizer._get_main_param_and_optimizer_states(param))
            here = optimizer._get_model_param_range_map(param)["param"]
            main, start, elements = found.pop("param"), here.start, here.end - here.start
        elif main in states:
            found = states[main]
        else:
            continue
        tensors = {
            name: value
            for name, value in found.items()
            if torch.is_tensor(value) and value.numel() == elements and name != "step"
        }
        if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
            tensors["fp32_param"] = main
        yield _Kept(optimizer, param, start, tensors, states.get(main, {}))
