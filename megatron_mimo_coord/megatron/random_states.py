"""What Megatron's layers look up in global variables: random states and a buffer that they share.

``initialize_model_parallel`` and ``model_parallel_cuda_manual_seed`` make them where all ranks have
the same parallel sizes. With a grid for each module nobody does, and layers fail when they are
built, or in their first forward. Leans on ``parallel_state`` making that buffer on request, and on
an embedding having its dropout as ``embedding_dropout``.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.names import told_of_missing_names

ADVICE = "call infra.initialize_megatron(seed) before the model is built"


@told_of_missing_names()
def initialize_global_state(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed every random state for a rank's place in its module, and make the buffer if need be.

    Args:
        seed: of the job; stages of a pipeline draw from different ones, replicas from the same.
        groups: of the module.
    """
    seed += 100 * groups.pp.rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(  # of whatever kind the tracker is, if there is one
        seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
    )
    if not _has_memory_buffer():
        parallel_state._set_global_memory_buffer()


@told_of_missing_names()
def global_state_problems() -> list[str]:
    """A sentence for each thing that layers would not find."""
    problems = []
    if not get_cuda_rng_tracker().is_initialized():
        problems.append(
            f"Megatron's random states are not initialised (model_parallel_cuda_manual_seed): "
            f"{ADVICE}"
        )
    if not _has_memory_buffer():
        problems.append(
            f"Megatron's global memory buffer is not initialised "
            f"(parallel_state._set_global_memory_buffer): {ADVICE}"
        )
    return problems


def needs_global_state(module: torch.nn.Module) -> bool:
    """Whether layers of a module draw from Megatron's random states and gather into its buffer."""
    return any(
        isinstance(layer, DotProductAttention)
        or (
            isinstance(layer, (ColumnParallelLinear, RowParallelLinear))
            and layer.config.sequence_parallel
        )
        for layer in module.modules()
    )


def drop_whole_embeddings_alike(module: torch.nn.Module, changes: Changes) -> None:
    """Have tensor-parallel ranks drop the same of a text that each of them embeds as a whole.

    With sequence parallelism Megatron drops as if each had its own part. But ``MimoModel`` shares
    out what it has put together, and in backward each rank gets the gradient of the whole.
    """
    for each in module.modules():
        if isinstance(each, LanguageModelEmbedding) and each.config.sequence_parallel:
            dropout = each.embedding_dropout
            if not each.scatter_to_sequence_parallel:
                changes.set(dropout, "forward", _drawn_alike(dropout.forward))


def _drawn_alike(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What draws from states that a module's tensor-parallel ranks share."""

    def drawn(*args: Any) -> torch.Tensor:
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            return function(*args)

    return drawn


def _has_memory_buffer() -> bool:
    """Whether layers will find the buffer into which they gather."""
    return parallel_state._GLOBAL_MEMORY_BUFFER is not None
