"""Settings of the whole suite."""

from typing import Any

from attrs import has
from hypothesis import settings
from layouts import LENGTH, case_name, layout_name

settings.register_profile("default", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("default")


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Names of tests that fit on a line."""
    if has(type(val)) and hasattr(val, "modules"):
        return case_name(val)
    if argname in ("modules", "layout", "vision", "language") and isinstance(val, dict):
        return layout_name(val)
    return val[:LENGTH] if isinstance(val, str) else None
