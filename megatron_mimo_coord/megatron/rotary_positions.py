"""Rotary positions of a language model with context parallelism.

Leans on ``cp_group`` of Megatron's rotary embeddings, for which they cut positions as the sequence
is cut. ``GPTModel`` gives plain ones that of its ``pg_collection``; YaRN's, and those of positions
in three parts (``mrope``), take a global one, or none. The latter must not be cut for packed
samples, whose positions are picked where they are used. Else shapes differ, or positions are wrong.
"""

import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.forwards import Forwards, Given


def cut_rotary_positions(
    model: MimoModel, group: dist.ProcessGroup, forwards: Forwards, changes: Changes
) -> None:
    """Have the language model on this rank cut positions for its own context-parallel ranks."""
    in_three_parts = []
    for module in model.language_model.modules():
        if isinstance(module, RotaryEmbedding | MultimodalRotaryEmbedding):
            changes.set(module, "cp_group", group)
        if isinstance(module, MultimodalRotaryEmbedding):
            in_three_parts.append(module)

    def choose(given: Given) -> None:
        for module in in_three_parts:
            module.cp_group = group if given.get("packing_kwargs") is None else None

    forwards.watch(choose)
