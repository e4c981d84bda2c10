"""Random states of each module on a rank, one module's in place at a time.

Megatron draws from one tracker a process, and PyTorch from one generator a device. Modules that
share ranks and differ in TP, DP or EP stand at different places in their grids: with one state for
all, replicas of one would draw different weights, or shards the same.

Leans on ``MimoModel`` building its modalities in the order of ``modality_submodules_spec``, into
``modality_submodules``, and then ``language_model``; without it modules are built from the states
of others, which a coordinator finds; and on the tracker giving its states out and taking them back,
without which checkpoints cannot resume. Recomputed activations take the states of their forward,
which Megatron's checkpointing keeps with them.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from attrs import define
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.problems import raise_problems
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import unsupported
from megatron_mimo_coord.megatron.names import told_of_missing_names
from megatron_mimo_coord.megatron.random_states import ADVICE, initialize_global_state

Grids = Mapping[str, Any]
Groups = Mapping[str, ProcessGroupCollection | None]
Saved = Mapping[str, Mapping[str, torch.Tensor]]
"""States of each module, by name; under an empty name those in place."""


@define
class _States:
    """What a module draws from: PyTorch's generators, and what Megatron tracks."""

    host: torch.Tensor
    device: Any
    tracked: dict[str, Any]

    @classmethod
    def now(cls, clone: bool = False) -> "_States":
        """Those in place; of a generator that CUDA graphs know, the generator or a clone."""
        tracker = get_cuda_rng_tracker()
        graph_safe = random.is_graph_safe_cuda_rng_tracker(tracker)
        device = random._get_cuda_rng_state(clone=clone, graph_safe=graph_safe)
        return cls(torch.get_rng_state(), device, tracker.get_states())

    def put(self) -> None:
        """Have everybody draw from them."""
        tracker = get_cuda_rng_tracker()
        graph_safe = random.is_graph_safe_cuda_rng_tracker(tracker)
        random._set_cuda_rng_state(self.device, graph_safe=graph_safe)
        torch.set_rng_state(self.host)  # last, as it is the device's too where there is no GPU
        tracker.set_states(self.tracked)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are saved."""
        named = {"host": self.host, "device": self.device, **self.tracked}
        return {name: _as_tensor(each) for name, each in named.items()}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Become those of which :meth:`tensors` were saved."""
        tracked = {name: each for name, each in saved.items() if name not in ("host", "device")}
        self.host = saved["host"]
        self.device = _restored(self.device, saved["device"])
        self.tracked |= {k: _restored(self.tracked.get(k), each) for k, each in tracked.items()}


def _as_tensor(state: Any) -> Any:
    """CUDA graphs know generators, and others their states."""
    return state.get_state() if isinstance(state, torch.Generator) else state


def _restored(before: Any, saved: torch.Tensor) -> Any:
    """What takes a state's place: a generator stays, and goes on from what was saved.

    One that another kind of device has saved is none of this one's.
    """
    if before is not None and _as_tensor(before).numel() != saved.numel():
        return before
    if not isinstance(before, torch.Generator):
        return saved
    before.set_state(saved)
    return before


class _Modules:
    """The states of the modules on this rank, of which the last, the language model's, rest."""

    def __init__(self, states: Mapping[str, _States], grids: Grids) -> None:
        self._states = dict(states)
        self._grids = grids
        self._resting = self._current = [*states][-1]
        self._to_build: list[str] = []
        self._submodules: Any = None
        self.handle = register_module_module_registration_hook(self._registered)

    def are_of(self, grids: Grids | None) -> bool:
        """Whether the modules are on these grids."""
        return self._grids.keys() == (grids or {}).keys() and all(
            grids is not None and grid is grids[name] for name, grid in self._grids.items()
        )

    def watch(self, modules: Mapping[str, Any], changes: Changes) -> None:
        """Have each draw from its own while it runs."""
        self._switch(self._resting)
        for name, module in modules.items():
            if name != self._resting:
                self._hook(name, module.module, changes)

    def _hook(self, name: str, module: torch.nn.Module, changes: Changes) -> None:
        before = module.register_forward_pre_hook(lambda *_: self._switch(name))
        after = module.register_forward_hook(
            lambda *_: self._switch(self._resting), always_call=True
        )
        changes.on_close(before.remove)
        changes.on_close(after.remove)

    def _switch(self, name: str) -> None:
        """Have everybody draw from a module's states."""
        if name != self._current:
            self._states[self._current] = _States.now()
            self._states[name].put()
            self._current = name

    @contextmanager
    def put_in_place(self, name: str) -> Iterator[None]:
        """Inside, everybody draws from a module's states."""
        before = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _registered(self, parent: torch.nn.Module, name: str, child: Any) -> None:
        """A module has got a child: PyTorch calls this for all there are."""
        if isinstance(parent, MimoModel) and name == "modality_submodules":
            if self.are_of(parent.mimo_config.module_to_grid_map):
                raise_problems("this model cannot be built", unsupported(parent))
                specs = parent.mimo_config.modality_submodules_spec
                self._submodules = child
                self._to_build = [each for each in (*specs, LANGUAGE) if each in self._states]
                self._next()
        elif parent is self._submodules and name in self._to_build:
            self._to_build.remove(name)
            self._next()

    def _next(self) -> None:
        self._switch(self._to_build[0] if self._to_build else self._resting)

    def at_rest(self) -> dict[str, _States]:
        """Those that are not in place."""
        return {name: each for name, each in self._states.items() if name != self._current}


_of_process: list[_Modules] = []  # one, as there is one tracker


@told_of_missing_names()
def initialize_module_states(seed: int, groups: Groups, grids: Grids) -> None:
    """Seed the states of each module for this rank's place in it; the language model's are last."""
    _forget()
    states = {}
    for name, each in groups.items():
        assert each is not None, "the module is on this rank"
        initialize_global_state(seed, each)
        states[name] = _States.now(clone=True)
    _of_process.append(_Modules(states, grids))


def forget_module_states(grids: Grids) -> None:
    """Leave the states in place as they are; modules are told apart no more."""
    if any(each.are_of(grids) for each in _of_process):
        _forget()


def _forget() -> None:
    while _of_process:
        _of_process.pop().handle.remove()


def draw_by_module(modules: Mapping[str, Any], grids: Grids, changes: Changes) -> None:
    """Have each module draw from its own states while it runs.

    ``MimoModel`` calls the ``forward`` of a DDP, which has no hooks, and that the module inside.
    """
    for each in _of_process:
        if each.are_of(grids):
            each.watch(modules, changes)


def states_in_place(name: str, grids: Grids) -> AbstractContextManager[None]:
    """Inside, everybody draws from the states of a module on this rank.

    Raises:
        RuntimeError: nobody has seeded them.
    """
    for each in _of_process:
        if each.are_of(grids):
            return each.put_in_place(name)
    raise RuntimeError(f"the modules have no random states of their own: {ADVICE}")


def module_states() -> dict[str, dict[str, torch.Tensor]]:
    """The states of PyTorch's and Megatron's generators, as ``Saved`` says."""
    at_rest = [pair for each in _of_process for pair in each.at_rest().items()]
    return {name: states.tensors() for name, states in [("", _States.now()), *at_rest]}


def restore_module_states(saved: Saved) -> None:
    """Go on drawing from where :func:`module_states` was called."""
    for each in _of_process:
        for name, states in each.at_rest().items():
            if name in saved:
                states.restore(saved[name])
    now = _States.now()
    now.restore(saved[""])
    now.put()
