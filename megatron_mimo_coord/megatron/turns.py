"""Whose turn it is on a rank that holds encoders and a stage of the language model.

Leans on ``MimoModel`` asking its ``role`` which modules it is to run, and building communicators
between modules that share all ranks, which refuse a pipeline, unless ``RankRole`` tells it that
they are not colocated. Without these a rank cannot run one module at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.config.role import ModuleLayout, RankRole

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.forwards import Given

_taking_turns: WeakSet[HyperCommGrid] = WeakSet()
_changes: list[Changes] = []


def take_turns(grids: Mapping[str, HyperCommGrid]) -> None:
    """Have a ``MimoModel`` on these grids know its modules' stages, whatever ranks they share."""
    if not _changes:
        colocated = RankRole._all_grids_colocated
        changes = Changes()
        changes.set(
            RankRole,
            "_all_grids_colocated",
            staticmethod(lambda each: each[LANGUAGE] not in _taking_turns and colocated(each)),
        )
        _changes.append(changes)
    _taking_turns.add(grids[LANGUAGE])


def forget_turns(grids: Mapping[str, HyperCommGrid]) -> None:
    """These grids are gone."""
    if grids[LANGUAGE] in _taking_turns:
        _taking_turns.remove(grids[LANGUAGE])
    if not _taking_turns and _changes:
        _changes.pop().close()


class _EncodersRole(RankRole):
    """Of a rank whose encoders run, be it none."""

    @property
    def has_modality_modules(self) -> bool:
        return True


class Turns:
    """Which modules a model runs.

    Attributes:
        encoders, language: whose turn it is; a model that must not run without one does not.
    """

    def __init__(self, model: MimoModel, must: bool) -> None:
        self._model = model
        self._must = must
        self.encoders = self.language = False

    def check(self, _: Given | None = None) -> None:
        """Refuse to run without a turn.

        Raises:
            RuntimeError: encoders share ranks with a pipelined language model, and somebody runs
                both at once.
        """
        if self._must and not (self.encoders or self.language):
            raise RuntimeError(
                "encoders share ranks with stages of the language model, and so run before and "
                "after it: call coordinator.forward_backward_func(...) in place of Megatron's "
                "forward_backward_pipelining_without_interleaving, with the same arguments"
            )

    @contextmanager
    def of_encoders(self) -> Iterator[None]:
        """Inside, the model runs this rank's encoders."""
        self.encoders = True
        try:
            with self._role(_EncodersRole, lambda name: name != LANGUAGE):
                yield
        finally:
            self.encoders = False

    @contextmanager
    def of_language(self) -> Iterator[None]:
        """Inside, it runs the language model's stage."""
        self.language = True
        try:
            with self._role(RankRole, lambda name: name == LANGUAGE):
                yield
        finally:
            self.language = False

    @contextmanager
    def _role(self, kind: type[RankRole], has_turn: Any) -> Iterator[None]:
        model, before = self._model, self._model.role
        modules = {name: stages for name, stages in before.modules.items() if has_turn(name)}
        with Changes() as changes:
            changes.set(model, "role", kind(modules, ModuleLayout.NON_COLOCATED))
            yield
        model.set_input_tensor({})  # or the last microbatch's tensors would stay
