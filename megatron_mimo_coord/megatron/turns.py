"""Whose turn it is on a rank that holds encoders and a stage of the language model.

Leans on ``MimoModel`` asking its ``role`` which modules it is to run, and building communicators
between modules that share all ranks, which refuse a pipeline, unless ``RankRole`` tells it that
they are not colocated. Without these a rank cannot run one module at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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

    @property
    def are_taken(self) -> bool:
        """Whether it is somebody's turn."""
        return self.encoders or self.language

    def check(self, _: Given | None = None) -> None:
        """Refuse to run without a turn.

        Raises:
            RuntimeError: encoders share ranks with a pipelined language model, and somebody runs
                both at once.
        """
        if self._must and not self.are_taken:
            raise RuntimeError(
                "encoders share ranks with stages of the language model, and so run before and "
                "after it: call coordinator.forward_backward_func(...) in place of Megatron's "
                "forward_backward_pipelining_without_interleaving, with the same arguments"
            )

    def of_encoders(self) -> AbstractContextManager[None]:
        """Inside, the model runs this rank's encoders."""
        return self._turn("encoders", _EncodersRole, LANGUAGE.__ne__)

    def of_language(self) -> AbstractContextManager[None]:
        """Inside, it runs the language model's stage."""
        return self._turn("language", RankRole, LANGUAGE.__eq__)

    @contextmanager
    def _turn(
        self, whose: str, kind: type[RankRole], has_turn: Callable[[str], bool]
    ) -> Iterator[None]:
        model, before = self._model, self._model.role
        modules = {name: stages for name, stages in before.modules.items() if has_turn(name)}
        with Changes() as changes:
            changes.set(self, whose, True)
            changes.set(model, "role", kind(modules, ModuleLayout.NON_COLOCATED))
            yield
        model.set_input_tensor({})  # or the last microbatch's tensors would stay
