"""What ``MimoModel`` asks for in a forward, and what it cannot run.

Leans on ``mimo_config`` holding the specs of modules and the grids, on a ``partition_adapter`` that
shares sequences out, and on ``mtp_num_layers`` of a config. Without these what cannot run fails on
some ranks, while the others wait. A forward of colocated modules calls
``_apply_colocated_comms`` where there are ``colocated_comms``, any other one
``_attach_modality_split_sizes`` and ``_has_encoder_tokens``, and asks the model's ``role`` for its
stages; an output carries ``_mimo_bridge_split_sizes``. Without these it is cut evenly.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from math import lcm
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.partition import utils as partition

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.world.timeouts import inherit_timeout


def unwrap_mimo_model(model: torch.nn.Module) -> MimoModel:
    """The ``MimoModel`` inside ``Float16Module`` and ``DistributedDataParallel``.

    Args:
        model: a ``MimoModel``, or a chain of wrappers with ``.module`` around one.

    Raises:
        RuntimeError: there is no ``MimoModel`` inside.

    Example:
        >>> unwrap_mimo_model(torch.nn.Linear(1, 1))
        Traceback (most recent call last):
        RuntimeError: there is no MimoModel inside Linear; pass the MimoModel itself, or a \
Float16Module or DistributedDataParallel around it
    """
    inner: Any = model
    while not isinstance(inner, MimoModel):
        if not isinstance(getattr(inner, "module", None), torch.nn.Module):
            raise RuntimeError(
                f"there is no MimoModel inside {type(model).__name__}; pass the MimoModel itself, "
                f"or a Float16Module or DistributedDataParallel around it"
            )
        inner = inner.module
    return inner


def is_first_stage(model: MimoModel, module: str) -> bool:
    """Whether this rank holds the first stage of one of its modules."""
    return bool(model.role.is_first_stage(module))


def is_last_stage(model: MimoModel, module: str) -> bool:
    """Whether it holds the last."""
    return bool(model.role.is_last_stage(module))


def read_texts_by(
    model: MimoModel,
    attach_split_sizes: Callable[[torch.Tensor, torch.Tensor | None, str], None],
    has_encoder_tokens: Callable[[torch.Tensor | None, str], bool],
    changes: Changes,
) -> None:
    """Have others read in a text what of an encoder's output is for whom, and whether it has any.

    Args:
        model, changes: whose methods they take the place of, and where that is recorded.
        attach_split_sizes: called with an output, the text and the encoder's name.
        has_encoder_tokens: called with the text and the name of an encoder that was not fed.
    """
    changes.set(model, "_attach_modality_split_sizes", attach_split_sizes)
    changes.set(model, "_has_encoder_tokens", has_encoder_tokens)


def expect_no_tokens_of(model: MimoModel, encoders: Container[str], changes: Changes) -> None:
    """Have a forward not look into a text for tokens of encoders that it leaves out."""
    has_tokens = model._has_encoder_tokens
    changes.set(
        model,
        "_has_encoder_tokens",
        lambda text, name: name not in encoders and has_tokens(text, name),
    )


_SPLIT_SIZES = "_mimo_bridge_split_sizes"


def split_sizes(output: torch.Tensor) -> Sequence[int] | None:
    """Of an output that is to be cut up the tokens of each sample, as ``MimoModel`` says."""
    return getattr(output, _SPLIT_SIZES, None)


def set_split_sizes(output: torch.Tensor, sizes: Sequence[int]) -> None:
    """Say them in its place."""
    vars(output)[_SPLIT_SIZES] = sizes


def carry_between_modules(
    model: MimoModel,
    carry: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    changes: Changes,
) -> None:
    """Have a forward of colocated modules carry tokens so, of each modality that there is.

    Collective: groups of Megatron's own bridges, which go on after that, wait as long as others.
    """
    changes.set(model, "_apply_colocated_comms", carry)
    inherit_timeout(*(bridge.gather_pg for bridge in model.colocated_comms.values()))


def carries_between_modules(model: MimoModel) -> bool:
    """Whether a forward carries tokens from module to module at all."""
    return bool(model.colocated_comms)


def empty_output(model: MimoModel, encoder: str) -> torch.Tensor:
    """Of an encoder that was not fed: no token, which wants a gradient."""
    output: torch.Tensor = model._empty_encoder_output(encoder)
    return output


def sequence_parts(model: MimoModel, is_packed: bool = False) -> tuple[int, str]:
    """By what the tokens of a text must divide, and whose ranks share them.

    Two chunks for each context-parallel rank, and with sequence parallelism each of these for the
    tensor-parallel ranks, or those of a row of packed samples, each of which is cut into chunks. Of
    the grid, which every rank knows.
    """
    cp, tp = _ranks_of_a_text(model)
    words = [f"2 x CP {cp}"] * (cp > 1) + [f"TP {tp} of sequence parallelism"] * (tp > 1)
    parts = lcm(2 * cp, cp * tp) if is_packed else 2 * cp * tp
    return parts if cp > 1 else tp, " x ".join(words)


def _ranks_of_a_text(model: MimoModel) -> tuple[int, int]:
    """(context-parallel, tensor-parallel) ranks that share its tokens."""
    grids = model.mimo_config.module_to_grid_map
    if not grids:
        return 1, 1
    grid = ModuleGrid.of(LANGUAGE, grids[LANGUAGE])
    return grid.dim("cp"), grid.dim("tp") if model.config.sequence_parallel else 1


def packed_sample_parts(model: MimoModel) -> int:
    """By what the tokens of each packed sample must divide: two chunks for each rank."""
    cp, _ = _ranks_of_a_text(model)
    return 2 * cp if cp > 1 else 1


def packing_problem(model: MimoModel, packing: Mapping[str, Any]) -> str:
    """Why context-parallel ranks cannot share a row of packed samples; empty if they can."""
    if packed_sample_parts(model) == 1:
        return ""
    if packing.get("cu_seqlens_q_padded") is None:
        return (
            "packing_kwargs has no cu_seqlens_q_padded, by which Megatron cuts packed samples for "
            "context-parallel ranks: pass it, the same as cu_seqlens_q where nothing is padded"
        )
    return "" if _has_thd_indices() else NEEDS_TRANSFORMER_ENGINE


NEEDS_TRANSFORMER_ENGINE = (
    "samples are packed and the language model has context parallelism, for which Megatron asks "
    "Transformer Engine 1.10 or newer (transformer_engine_torch), and this environment has none: "
    "install it, or give each sample a row of its own and leave packing_kwargs out"
)


def _has_thd_indices() -> bool:
    return bool(partition._HAVE_TEX and partition.is_te_min_version("1.10.0"))


def unsupported(model: MimoModel) -> list[str]:
    """A sentence for each setting of a model that ``MimoModel`` cannot run.

    Said on every rank before the language model is built, which would fail on some; and once more
    when it is built.
    """
    config, problems = model.config, [*_token_problems(model)]
    if getattr(config, "mtp_num_layers", None):
        problems.append(
            f"the language model's config has mtp_num_layers={config.mtp_num_layers}, and "
            f"Megatron's MimoModel hands it no input_ids, which multi-token prediction predicts "
            f"from: set mtp_num_layers=None and leave out mtp_block_spec"
        )
    adapter = model.partition_adapter
    embedding = getattr(bare(getattr(model, "language_model", None)), "embedding", None)
    scatters = getattr(embedding, "scatter_to_sequence_parallel", False)
    if adapter is not None and adapter.cfg.seq_parallel and scatters:
        problems.append(
            "the language model shares its sequences out where it embeds words, and MimoModel does "
            "so once more: pass it scatter_embedding_sequence_parallel=False"
        )
    is_packed = model.mimo_config.kv_format == "thd"
    if is_packed and packed_sample_parts(model) > 1 and not _has_thd_indices():
        problems.append(f'kv_format="thd": {NEEDS_TRANSFORMER_ENGINE}')
    return problems


def bare(module: Any) -> Any:
    """What is inside ``Float16Module`` and DDP."""
    while isinstance(getattr(module, "module", None), torch.nn.Module):
        module = module.module
    return module


def _token_problems(model: MimoModel) -> Iterator[str]:
    """Encoders whose place in a text nobody can tell."""
    encoders: dict[int | None, list[str]] = {}
    for name in model.mimo_config.modality_submodules_spec:
        encoders.setdefault(model.special_token_ids.get(name), []).append(name)
    for token, names in encoders.items():
        if token is None or len(names) > 1:
            has = "no special token" if token is None else f"the same special token {token}"
            yield (
                f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} {has}, by which a text "
                f"says where an encoder's tokens stand: give each one of its own in "
                f"MimoModelConfig(special_token_ids=...)"
            )
