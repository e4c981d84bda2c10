"""Settings of the whole suite."""

from typing import Any

from attrs import has
from hypothesis import settings
from layouts import LENGTH, case_name, layout_name
from ranks import kill_all

from megatron_mimo_coord import ModuleParallelism

settings.register_profile("default", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("default")


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
