"""Another Bridge, and none, are told in one sentence; `.ci/clients` runs the real one's loop."""

import importlib
import sys

import pytest

from megatron_mimo_coord import megatron_bridge

SETUP = "megatron.bridge.training.setup_megatron_mimo"
NAMES = [
    "MultiModulePipelineCommunicator",
    "_update_megatron_mimo_model_config_funcs",
    "MegatronMIMOSetupOutput",
]


@pytest.fixture
def bridge(tmp_path, monkeypatch):
    """A Bridge that has these names alone, until the end of the test."""

    def install(names):
        folder = tmp_path / "megatron/bridge/training"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text('__version__ = "0.9.1"\n')
        (folder / "__init__.py").touch()
        (folder / "setup_megatron_mimo.py").write_text(
            "".join(f"{name} = print\n" for name in names)
        )
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    megatron_bridge.disable()
    for name in [name for name in sys.modules if f"{name}.".startswith("megatron.bridge.")]:
        del sys.modules[name]


def test_another_bridge_is_told_by_what_is_gone(bridge):
    bridge(NAMES[:1])
    with pytest.raises(RuntimeError) as error:
        megatron_bridge.enable()
    assert str(error.value).startswith(
        f"megatron-bridge 0.9.1: {SETUP} has no {', '.join(NAMES[1:])},"
    )
    assert str(error.value).endswith(
        "use megatron-bridge 0.6, or the release of this package for it"
    )


def test_disabling_puts_all_names_back(bridge):
    bridge(NAMES)
    setup = importlib.import_module(SETUP)
    before = dict(vars(setup))
    megatron_bridge.enable()
    megatron_bridge.enable()
    assert {name for name, value in vars(setup).items() if value is not before[name]} == set(NAMES)
    with pytest.raises(RuntimeError, match="has not set up a model since enable"):
        megatron_bridge.coordinator()
    megatron_bridge.disable()
    assert vars(setup) == before
    megatron_bridge.disable()
    with pytest.raises(RuntimeError, match=r"call megatron_mimo_coord\.megatron_bridge\.enable"):
        megatron_bridge.coordinator()


def test_without_bridge_the_first_line_says_what_to_install():
    with pytest.raises(RuntimeError) as error:
        megatron_bridge.enable()
    assert str(error.value) == (
        "megatron.bridge is not there: enable() wants Megatron-Bridge 0.6 (pip install "
        "megatron-bridge==0.6.2), whose pretrain_megatron_mimo it is for"
    )
