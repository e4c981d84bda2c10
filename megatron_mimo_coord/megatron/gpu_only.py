"""Where Megatron-Core asks for a GPU by a function of its own, and not by PyTorch's words for it.

Leans on random states being read and set through two functions and drawn from inside ``fork``, on
one function that copies split sizes of experts to the host, and on one that reduces and scatters.
Where one goes, models are not built, or do not run, where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_mimo_coord.megatron.names import told_of_missing_names


@told_of_missing_names()
def places() -> dict[str, tuple[Any, str]]:
    """(owner, name) of each, by what it does."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    found = {
        "get a random state": (random, "_get_cuda_rng_state"),
        "set a random state": (random, "_set_cuda_rng_state"),
        "draw from a random state": (random.CudaRNGStatesTracker, "fork"),
        "copy split sizes": (token_dispatcher, "maybe_move_tensor_to_cpu"),
        "reduce and scatter": (param_and_grad_buffer, "dist_reduce_scatter_func"),
    }
    for owner, name in found.values():
        getattr(owner, name)  # what nobody calls any more must not be replaced in silence
    return found


@contextmanager
def drawing_from(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from a state of the tracker, of the one generator; its own takes it for two."""
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)
