"""What Megatron's optimizers keep for weights: moments, fp32 copies, numbers of updates, scales.

Leans on ``DistributedOptimizer`` telling which elements of a parameter it keeps something for, and
handing that out, or copies of it, by ``_get_main_param_and_optimizer_states``; on other optimizers
keeping it in PyTorch's, under the parameter or its ``main_param``; on ``init_state_fn`` making what
the first update would make; and on the settings by which Megatron tells parameter groups apart.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mimo_coord.megatron.optimizers import optimizers_here


@frozen(eq=False)
class KeptState:
    """What an optimizer keeps on this rank for one parameter.

    Args:
        param: the model's parameter.
        start: the first of its elements that are kept here, in memory order.
        stop: behind the last.
        tensors: what is kept for them, by name, each with ``stop - start`` elements.
        state: all that the optimizer keeps, its number of updates too.
        is_range: whether data-parallel ranks share the elements out.
    """

    param: torch.nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]
    state: dict[str, Any]
    is_range: bool


class ModuleOptimizerState:
    """What the optimizers of one module keep: one for its dense weights, another for experts.

    State that the first update would make is made.

    Args:
        optimizer: those of all modules.
        name: the module.
        ddp: the module.
    """

    def __init__(self, optimizer: MimoOptimizer, name: str, ddp: DistributedDataParallel) -> None:
        self.name = name
        self._optimizers = _inner_optimizers(optimizer, name)
        params = [param for param in ddp.module.parameters() if param.requires_grad]
        for each in self._optimizers:
            _initialize(each)
        self._kept = [(each, kept) for each in self._optimizers for kept in _kept(each, params)]
        self._scalers = [
            each.grad_scaler for each in self._optimizers if getattr(each, "grad_scaler", None)
        ]

    @property
    def kept(self) -> list[KeptState]:
        """Of each parameter that an optimizer here has."""
        return [kept for _, kept in self._kept]

    def groups(self) -> Iterator[dict[str, Any]]:
        """Settings of the groups that have parameters here."""
        for optimizer in self._optimizers:
            yield from (group for group in optimizer.optimizer.param_groups if group["params"])

    def hand_back(self) -> None:
        """Give filled tensors to optimizers that had handed out copies of theirs."""
        for optimizer, kept in self._kept:
            if optimizer.config.use_precision_aware_optimizer:
                tensors: dict[str, Any] = dict(kept.tensors)
                tensors["param"] = tensors.pop("fp32_param", None)
                optimizer._set_main_param_and_optimizer_states(kept.param, tensors)

    def loss_scale(self) -> dict[str, float]:
        """The state of the loss scale; empty where there is none."""
        states = [scaler.state_dict() for scaler in self._scalers]
        return {name: float(value) for state in states for name, value in state.items()}

    def load_loss_scale(self, saved: Mapping[str, float]) -> None:
        """Go on with what :meth:`loss_scale` said, if there was one."""
        for scaler in self._scalers if saved else ():
            state = scaler.state_dict()
            scaler.load_state_dict(
                {name: like(value, saved[name]) for name, value in state.items()}
            )


def like(old: Any, value: Any) -> Any:
    """A number in the form that it had."""
    return torch.full_like(old, float(value)) if torch.is_tensor(old) else type(old)(value)


def identifier_keys() -> tuple[str, ...]:
    """The settings by which Megatron tells parameter groups apart."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return tuple(param_group_identifier_keys)


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


def _inner_optimizers(optimizer: MimoOptimizer, name: str) -> list[Any]:
    """The optimizers of a module that hold parameters, on this rank."""
    found = optimizers_here(optimizer).get(name)
    if found is None:
        return []
    inner = getattr(found, "chained_optimizers", [found])
    return [each for each in inner if not getattr(each, "is_stub_optimizer", False)]


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


def _kept(optimizer: Any, params: list[torch.nn.Parameter]) -> Iterator[KeptState]:
    """What an optimizer keeps for those of the parameters that are its own."""
    if isinstance(optimizer, DistributedOptimizer):
        for param in optimizer.model_param_group_index_map:
            found = dict(optimizer._get_main_param_and_optimizer_states(param))
            here = optimizer._get_model_param_range_map(param)["param"]
            main = found.pop("param")
            state = optimizer.optimizer.state.get(main, {})
            tensors = _tensors(param, main, found, here.end - here.start)
            yield KeptState(param, here.start, here.end, tensors, state, is_range=True)
        return
    inner = optimizer.optimizer
    for param in params:
        main = getattr(param, "main_param", param)
        if main in inner.state:
            state = inner.state[main]
            tensors = _tensors(param, main, state, param.numel())
            yield KeptState(param, 0, param.numel(), tensors, state, is_range=False)


def _tensors(
    param: torch.nn.Parameter, main: torch.Tensor, kept: Mapping[str, Any], elements: int
) -> dict[str, torch.Tensor]:
    """Of what is kept, the tensors with a number for each element; and the fp32 copy, if it is one.

    Args:
        param: the model's parameter.
        main: what the optimizer updates.
        kept: what it keeps for that, by name.
        elements: how many there are here.
    """
    tensors = {
        name: value
        for name, value in kept.items()
        if torch.is_tensor(value) and value.numel() == elements and name != "step"
    }
    if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
        tensors["fp32_param"] = main
    return tensors
