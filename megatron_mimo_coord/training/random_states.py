"""The states of the random number generators of a rank, and back."""

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
    found: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "megatron": dict(tracked_states()),
        "modules": dict(states_at_rest()),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (name, keys.tolist(), *rest)
    return found


def restore_random_states(saved: dict[str, Any]) -> None:
    """Go on drawing from where :func:`random_states` was called."""
    random.setstate(saved["python"])
    torch.set_rng_state(saved["torch"])
    restore_tracked_states(saved["megatron"])
    restore_states_at_rest(saved["modules"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    if "numpy" in saved and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(saved["numpy"])
