"""The states of the random number generators of a rank, as JSON, and back."""

import base64
import random
import sys
from typing import Any

import torch

from megatron_mimo_coord.megatron.module_random_states import (
    restore_states_at_rest,
    states_at_rest,
)
from megatron_mimo_coord.megatron.random_states import restore_tracked_states, tracked_states


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and Megatron's generators on this rank.

    Example:
        >>> before = random_states()
        >>> drawn = random.random(), torch.rand(())
        >>> restore_random_states(before)
        >>> (random.random(), torch.rand(())) == drawn
        True
    """
    version, integers, gauss = random.getstate()
    found: dict[str, Any] = {
        "python": [version, list(integers), gauss],
        "torch": _text(torch.get_rng_state()),
        "megatron": {name: _text(state) for name, state in tracked_states().items()},
        "modules": {name: _text(state) for name, state in states_at_rest().items()},
    }
    if torch.cuda.is_available():
        found["cuda"] = _text(torch.cuda.get_rng_state())
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = [name, keys.tolist(), *rest]
    return found


def restore_random_states(saved: dict[str, Any]) -> None:
    """Go on drawing from where :func:`random_states` was called."""
    version, integers, gauss = saved["python"]
    random.setstate((version, tuple(integers), gauss))
    torch.set_rng_state(_bytes(saved["torch"]))
    restore_tracked_states({name: _bytes(text) for name, text in saved["megatron"].items()})
    modules = saved.get("modules", {})
    restore_states_at_rest({name: _bytes(text) for name, text in modules.items()})
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))
    if "numpy" in saved and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(saved["numpy"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8, device="cpu")
