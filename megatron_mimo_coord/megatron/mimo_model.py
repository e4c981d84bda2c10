"""What ``MimoModel`` is given in a forward, and what it cannot run.

Leans on ``input_ids`` being the first argument of its forward, on ``mimo_config`` holding the spec
of the language model, and on ``mtp_num_layers`` of a config. Without the first nobody reads a text;
without the others what cannot run fails on some ranks, while the others wait.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo import MimoModel


def input_ids_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The text of a forward, None if there is none."""
    return kwargs.get("input_ids", args[0] if args else None)


def unsupported(model: MimoModel) -> list[str]:
    """A sentence for each setting of a language model that ``MimoModel`` cannot run.

    Said on every rank before the language model is built, which would fail on some.
    """
    config, problems = model.config, []
    if getattr(config, "mtp_num_layers", None):
        problems.append(
            f"the language model's config has mtp_num_layers={config.mtp_num_layers}, and "
            f"Megatron's MimoModel hands it no input_ids, which multi-token prediction predicts "
            f"from: set mtp_num_layers=None and leave out mtp_block_spec"
        )
    length = model.mimo_config.language_model_spec.params.get("max_sequence_length", 0)
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if length % parts:
        problems.append(
            f"the language model's max_sequence_length is {length}, which its {parts} "
            f"tensor-parallel ranks cannot share: make it, and pad texts to, a multiple of {parts}"
        )
    return problems
