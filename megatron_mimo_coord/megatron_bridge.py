"""One line for Megatron-Bridge's own loop: its set-up ends with a coordinator attached.

    import megatron_mimo_coord.megatron_bridge as coordinated

    coordinated.enable()  # before pretrain_megatron_mimo(cfg, forward_step, build_data_iterators)

Bridge is no dependency: it is imported where it is used. Leans on three names of Bridge 0.6's
``training.setup_megatron_mimo``, by which its set-up makes a communicator, sets the hooks of the
model's config, and hands out what it made; without them there is nothing to take the place of.
Bridge zeroes gradients through the DDPs, which a coordinator follows.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from megatron.core.utils import get_model_config

from megatron_mimo_coord.coordinator import MultiModuleCoordinator
from megatron_mimo_coord.megatron.changes import Changes

_SETUP = "megatron.bridge.training.setup_megatron_mimo"
_COMMUNICATOR = "MultiModulePipelineCommunicator"
_HOOKS = "_update_megatron_mimo_model_config_funcs"
_OUTPUT = "MegatronMIMOSetupOutput"


class _Enabled:
    """Stands in Bridge's set-up until its changes are undone.

    Attributes:
        coordinator: the one of the last set-up; None before the first.
    """

    def __init__(self, setup: ModuleType) -> None:
        self.coordinator: MultiModuleCoordinator | None = None
        self.changes = Changes()
        self.changes.on_close(self._close_coordinator)
        output = getattr(setup, _OUTPUT)
        # Bridge makes one before its optimizer; the coordinator's is made at the end.
        self.changes.set(setup, _COMMUNICATOR, lambda *_, **__: None)
        self.changes.set(setup, _HOOKS, self._attach)
        self.changes.set(setup, _OUTPUT, lambda **made: output(**made | self._made(made["model"])))

    def _close_coordinator(self) -> None:
        if self.coordinator is not None:
            self.coordinator.close()
            self.coordinator = None

    def _attach(self, model: Any, optimizer: Any, infra: Any, pairs: Any) -> None:
        """In the place of setting Bridge's hooks, with the same arguments."""
        self._close_coordinator()
        coordinator = MultiModuleCoordinator(infra, model)
        coordinator.attach(get_model_config(model), optimizer)
        self.coordinator = coordinator

    def _made(self, model: Any) -> dict[str, Any]:
        """What the set-up returns of the coordinator's."""
        assert self.coordinator is not None
        communicator = self.coordinator.build_pipeline_communicator(get_model_config(model))
        return {
            "multimodule_communicator": communicator,
            "multimodule_pg_collection": self.coordinator.schedule_pg_collection,
        }


_enabled: list[_Enabled] = []


def enable() -> None:
    """Have every later ``setup_megatron_mimo`` end with a coordinator attached.

    Its set-up builds a :class:`~megatron_mimo_coord.MultiModuleCoordinator` of its own infra and
    model, which takes the places of Bridge's hooks and communicator. Call it on every rank, before
    ``pretrain_megatron_mimo``, any number of them; a second call changes nothing. A set-up closes
    the coordinator of the one before it.

    Raises:
        RuntimeError: Megatron-Bridge is not installed, or is another series than 0.6, in which a
            name is gone that this leans on.
    """
    if not _enabled:
        _enabled.append(_Enabled(_bridge_setup()))


def coordinator() -> MultiModuleCoordinator:
    """The coordinator of the last set-up, for ``grad_norms``, ``record_timeline`` and the like.

    It is there from the set-up's data iterators on.

    Raises:
        RuntimeError: :func:`enable` was not called, or no set-up has run since.
    """
    if not _enabled:
        raise RuntimeError(
            "Megatron-Bridge has no coordinator: call megatron_mimo_coord.megatron_bridge.enable() "
            "before pretrain_megatron_mimo"
        )
    found = _enabled[-1].coordinator
    if found is None:
        raise RuntimeError(
            "Megatron-Bridge has not set up a model since enable(): ask for the coordinator in "
            "build_data_iterators, in the forward step, or after pretrain_megatron_mimo"
        )
    return found


def disable() -> None:
    """Undo :func:`enable`, and close the coordinator of the last set-up.

    Bridge's set-up is its own again. A model that was set up meanwhile has no hooks any more, its
    own or the coordinator's. A second time does nothing.
    """
    while _enabled:
        _enabled.pop().changes.close()


def _bridge_setup() -> ModuleType:
    """Bridge's module that sets up a job.

    Raises:
        RuntimeError: it is not there, or lacks a name.
    """
    try:
        setup = import_module(_SETUP)
    except ModuleNotFoundError as error:
        if error.name is None or not _SETUP.startswith(error.name):
            raise  # Bridge lacks one of its own dependencies, and says which
        raise RuntimeError(
            f"{error.name} is not there: enable() wants Megatron-Bridge 0.6 (pip install "
            f"megatron-bridge==0.6.2), whose pretrain_megatron_mimo it is for"
        ) from error
    gone = [name for name in (_COMMUNICATOR, _HOOKS, _OUTPUT) if not hasattr(setup, name)]
    if gone:
        version = import_module("megatron.bridge").__version__
        raise RuntimeError(
            f"megatron-bridge {version}: {_SETUP} has no {', '.join(gone)}, in whose place "
            f"enable() puts the coordinator's; use megatron-bridge 0.6, or the release of this "
            f"package for it"
        )
    return setup
