"""What Megatron's layers look up in global variables: random states and a buffer that they share.

``initialize_model_parallel`` and ``model_parallel_cuda_manual_seed`` make them where all ranks have
the same parallel sizes. With a grid for each module nobody does, and layers fail when they are
built, or in their first forward.
"""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

ADVICE = "call infra.initialize_megatron(seed) before the model is built"


def initialize_global_state(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed every random state for a rank's place in its module, and make the buffer if need be.

    Args:
        seed: of the job; stages of a pipeline draw from different ones, replicas from the same.
        groups: of the module.
    """
    seed += 100 * groups.pp.rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )
    if not has_memory_buffer():
        parallel_state._set_global_memory_buffer()


def has_memory_buffer() -> bool:
    """Whether layers will find the buffer into which they gather."""
    return parallel_state._GLOBAL_MEMORY_BUFFER is not None


def global_state_problems() -> list[str]:
    """A sentence for each thing that layers would not find."""
    problems = []
    if not get_cuda_rng_tracker().is_initialized():
        problems.append(
            f"Megatron's random states are not initialised (model_parallel_cuda_manual_seed): "
            f"{ADVICE}"
        )
    if not has_memory_buffer():
        problems.append(
            f"Megatron's global memory buffer is not initialised "
            f"(parallel_state._set_global_memory_buffer): {ADVICE}"
        )
    return problems
