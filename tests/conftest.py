"""Settings of the whole suite."""

from typing import Any

import pytest
from attrs import has
from hypothesis import settings
from layouts import LENGTH, case_name, layout_name
from ranks import forkserver_address, kill_all, use_forkserver

from megatron_mimo_coord import ModuleParallelism

settings.register_profile("default", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let several workers share a forkserver, which takes seconds to import everything."""
    if len(node.config.option.tx) > 1:
        node.workerinput["forkserver"] = forkserver_address()


def pytest_configure(config: pytest.Config) -> None:
    """Find the forkserver that the workers share."""
    address = getattr(config, "workerinput", {}).get("forkserver")
    if address:
        use_forkserver(address)


def pytest_sessionfinish() -> None:
    """Leave no rank behind, in whichever process the tests ran."""
    kill_all()


def is_module(value: Any) -> bool:
    return isinstance(value, ModuleParallelism)


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Names of tests that fit on a line."""
    if has(type(val)) and hasattr(val, "modules"):
        return case_name(val)
    if isinstance(val, dict) and val and all(map(is_module, val.values())):
        return layout_name(val)
    return val[:LENGTH] if isinstance(val, str) else None
