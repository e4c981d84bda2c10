"""Random states of each module on a rank, one module's in place at a time.

Megatron draws from one tracker a process, and PyTorch from one generator a device. Modules that
share ranks and differ in TP, DP or EP stand at different places in their grids: with one state for
all, replicas of one would draw different weights, or shards the same.

Leans on ``MimoModel`` building its modalities in the order of ``modality_submodules_spec``, into
``modality_submodules``, and then ``language_model``; without it modules are built from the states
of others, which a coordinator finds. Recomputed activations take the states of their forward, which
Megatron's checkpointing keeps with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define, evolve
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
from megatron_mimo_coord.megatron.random_states import (
    as_tensor,
    initialize_global_state,
    restore_tracked_states,
    restored,
    tracked_states,
)

Grids = Mapping[str, Any]
Groups = Mapping[str, ProcessGroupCollection | None]


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
        torch.set_rng_state(self.host)
        random._set_cuda_rng_state(self.device, graph_safe=graph_safe)
        tracker.set_states(self.tracked)


class ModuleRandomStates:
    """The states of the modules on this rank.

    Args:
        states: of each module, the last one's in place; the language model is the last.
        grids: of all modules.
    """

    def __init__(self, states: Mapping[str, _States], grids: Grids) -> None:
        self._states = dict(states)
        self._grids = grids
        self._resting = self._current = [*states][-1]
        self._to_build: list[str] = []
        self._submodules: Any = None
        self._handle = register_module_module_registration_hook(self._registered)

    # -- one a process, as the tracker is ----------------------------------------------------------

    @classmethod
    @told_of_missing_names()
    def initialize(cls, seed: int, groups: Groups, grids: Grids) -> None:
        """Seed the states of each module for this rank's place in it.

        Args:
            seed: of the job.
            groups: process groups of the modules on this rank, the language model's last.
            grids: of all modules.
        """
        _forget()
        states = {}
        for name, each in groups.items():
            assert each is not None, "the module is on this rank"
            initialize_global_state(seed, each)
            states[name] = _States.now(clone=True)
        _of_process.append(cls(states, grids))

    @classmethod
    def forget(cls, grids: Grids) -> None:
        """Leave the states in place as they are; modules are told apart no more."""
        if _of(grids) is not None:
            _forget()

    @classmethod
    def draw_by_module(cls, modules: Mapping[str, Any], grids: Grids, changes: Changes) -> None:
        """Have each module draw from its own states while it runs.

        Args:
            modules: the DDPs of those on this rank; ``MimoModel`` calls their ``forward``, which
                has no hooks, and that calls the module inside.
            grids: of all modules.
            changes: where is recorded what is hooked to them.
        """
        found = _of(grids)
        if found is None:
            return
        found._switch(found._resting)
        for name, module in modules.items():
            if name != found._resting:
                found._hook(name, module.module, changes)

    # -- while they run ----------------------------------------------------------------------------

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

    # -- while they are built ----------------------------------------------------------------------

    def _registered(self, parent: torch.nn.Module, name: str, child: Any) -> None:
        """A module has got a child: PyTorch calls this for all there are."""
        if isinstance(parent, MimoModel) and name == "modality_submodules":
            if _is(self._grids, parent.mimo_config.module_to_grid_map):
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

    # -- in checkpoints ----------------------------------------------------------------------------

    def at_rest(self) -> dict[str, torch.Tensor]:
        """The states that are not in place, by module and name."""
        found: dict[str, Any] = {}
        for module, states in self._states.items():
            if module != self._current:
                found |= {f"{module}/host": states.host, f"{module}/device": states.device}
                found |= {f"{module}/{name}": each for name, each in states.tracked.items()}
        return {name: as_tensor(each) for name, each in found.items()}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Have those at rest go on from where :meth:`at_rest` was called."""
        for module, states in self._states.items():
            if module == self._current or f"{module}/host" not in saved:
                continue
            self._states[module] = evolve(
                states,
                host=saved[f"{module}/host"],
                device=restored(states.device, saved[f"{module}/device"]),
                tracked={
                    name: restored(each, saved[f"{module}/{name}"])
                    for name, each in states.tracked.items()
                },
            )


_of_process: list[ModuleRandomStates] = []


def _forget() -> None:
    while _of_process:
        _of_process.pop()._handle.remove()


def _of(grids: Grids) -> ModuleRandomStates | None:
    found = next(iter(_of_process), None)
    return found if found is not None and _is(found._grids, grids) else None


def _is(grids: Grids, others: Grids | None) -> bool:
    """Whether two maps hold the same grids."""
    return grids.keys() == (others or {}).keys() and all(
        others is not None and grid is others[name] for name, grid in grids.items()
    )


def states_at_rest() -> dict[str, torch.Tensor]:
    """Of modules that share this rank, the states that are not in place, by module and name."""
    return _of_process[0].at_rest() if _of_process else {}


def restore_states_at_rest(saved: Mapping[str, torch.Tensor]) -> None:
    """Have them go on from where :func:`states_at_rest` was called."""
    if _of_process:
        _of_process[0].restore(saved)


def remember_random_states() -> Callable[[], None]:
    """What makes all generators go on from where they are now, whenever it is called."""
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    tracked, resting = tracked_states(), states_at_rest()

    def go_back() -> None:
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
        restore_tracked_states(tracked)
        restore_states_at_rest(resting)

    return go_back
