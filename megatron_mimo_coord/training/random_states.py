"""The states of the random number generators of a rank, and back."""

import random
import sys
from typing import Any

from megatron_mimo_coord.megatron.module_random_states import module_states, restore_module_states


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and Megatron's generators on this rank.

    Example:
        >>> before = random_states()
        >>> drawn = random.random(), torch.rand(())
        >>> restore_random_states(before)
        >>> (random.random(), torch.rand(())) == drawn
        True
    """
    found: dict[str, Any] = {"python": random.getstate(), "modules": module_states()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (name, keys.tolist(), *rest)
    return found


def restore_random_states(saved: dict[str, Any]) -> None:
    """Go on drawing from where :func:`random_states` was called."""
    random.setstate(saved["python"])
    restore_module_states(saved["modules"])
    if "numpy" in saved and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(saved["numpy"])
