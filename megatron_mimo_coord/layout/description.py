"""A layout in numbers and as text: what each module gets, and how the modules hang together."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from megatron_mimo_coord.layout.fields import MAX_RANKS
from megatron_mimo_coord.layout.grids import (
    LANGUAGE,
    ModuleGrid,
    is_colocated,
    ranks_taken,
    runs_encoders_first,
    span,
    stages_behind,
)
from megatron_mimo_coord.layout.parallelism import SIZE_FIELDS


def summarize(
    grids: Mapping[str, ModuleGrid],
    factors: Mapping[str, float],
    *,
    per_token: bool,
    micro_batch_size: int | None = None,
    num_microbatches: int | None = None,
) -> dict[str, Any]:
    """The numbers of a layout that can run, in types that JSON knows.

    Args:
        grids: where each module lies.
        factors: from what DDP delivers for each module to the gradient of the loss.
        per_token: whether the loss is divided by the number of tokens.
        micro_batch_size: samples in a microbatch over all ranks, None if it is not known.
        num_microbatches: microbatches in an optimizer step, None if it is not known.
    """
    language = grids[LANGUAGE]
    return {
        "ranks": ranks_taken(grids.values()),
        "colocated": len(grids) > 1 and is_colocated(grids.values()),
        "encoders_first": runs_encoders_first(grids),
        "pipeline_depth": pipeline_depth(grids),
        "loss": "per-token" if per_token else "mean",
        "micro_batch_size": micro_batch_size,
        "num_microbatches": num_microbatches,
        "modules": {
            name: {
                "first_rank": grid.ranks[0],
                "last_rank": grid.ranks[-1],
                **{SIZE_FIELDS[dim]: grid.dim(dim) for dim in ("tp", "cp", "pp", "dp")},
                "expert_model_parallel_size": grid.expert_sizes and grid.expert_sizes[0],
                "expert_tensor_parallel_size": grid.expert_sizes and grid.expert_sizes[1],
                "samples_per_rank_and_microbatch": micro_batch_size
                and _share(micro_batch_size, grid.data_parallel_size),
                "gradient_scaling_factor": factors[name],
                "bridge": None if name == LANGUAGE else bridge(grid, language),
            }
            for name, grid in grids.items()
        },
    }


def _share(samples: int, replicas: int) -> float:
    """Samples of a replica: whole, unless the batch cannot be dealt out."""
    return samples / replicas if samples % replicas else samples // replicas


def pipeline_depth(grids: Mapping[str, ModuleGrid]) -> int:
    """Stages that a microbatch passes through: the deepest encoder's, then the language model's.

    Encoders on ranks of the language model are no stages of their own.

    Example:
        >>> vision = ModuleGrid("vision", (2,), ("pp",))
        >>> language = ModuleGrid("language", (4,), ("pp",), rank_offset=2)
        >>> pipeline_depth({"vision": vision, "language": language})
        6
    """
    return 1 + max(stages_behind(grids, name, 0) for name in grids)


def bridge(encoder: ModuleGrid, language: ModuleGrid) -> str:
    """Direction of the bridge from an encoder to the language model, as DP to DP.

    Example:
        >>> bridge(ModuleGrid("vision", (4,), ("dp",)), ModuleGrid("language", (2,), ("dp",), 4))
        'fan-in 4:2'
    """
    here, there = encoder.data_parallel_size, language.data_parallel_size
    kind = "fan-in" if here > there else "fan-out" if here < there else "one to one"
    return f"{kind} {here}:{there}"


def headline(summary: Mapping[str, Any]) -> str:
    """What a summary says of the job as a whole, in a line."""
    if summary["encoders_first"]:
        how = "on shared ranks, encoders before and after the language model"
    else:
        how = "colocated" if summary["colocated"] else f"on disjoint ranks{_exceptions(summary)}"
    modules = f"modules {how}" if len(summary["modules"]) > 1 else "one module"
    size, number = summary["micro_batch_size"], summary["num_microbatches"]
    batch = "a microbatch" if size is None else _count(size, "sample")
    times = "at a time" if number is None else f"in each of {_count(number, 'microbatch', 'es')}"
    return (
        f"{_count(summary['ranks'], 'rank')}, {modules}; "
        f"{_count(summary['pipeline_depth'], 'pipeline stage')}; {batch} {times}; "
        f"{summary['loss']} loss"
    )


def _exceptions(summary: Mapping[str, Any]) -> str:
    """Which modules share ranks, where not all do."""
    names: dict[str, list[str]] = {}
    for name, module in summary["modules"].items():
        first, last = module["first_rank"], module["last_rank"]
        ranks = f"rank{'s' if last > first else ''} {span(range(first, last + 1))}"
        names.setdefault(ranks, []).append(name)
    shared = [
        f"{' and '.join(sharing)} share {ranks}"
        for ranks, sharing in names.items()
        if len(sharing) > 1
    ]
    return f", but {' and '.join(shared)}" if shared else ""


def module_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each module of a summary, below a row of titles."""
    sizes = dict(_SIZES)
    if not any(_has_experts(module) for module in summary["modules"].values()):
        del sizes["EP"], sizes["expert TP"]
    rows = [("module", "ranks", *sizes, "samples/rank", "gradient x", "bridge")]
    for name, module in summary["modules"].items():
        samples = module["samples_per_rank_and_microbatch"]
        rows.append(
            (
                name,
                span(range(module["first_rank"], module["last_rank"] + 1)),
                *(str(module[key]) for key in sizes.values()),
                f"1/{module['data_parallel_size']}" if samples is None else str(samples),
                str(Fraction(module["gradient_scaling_factor"]).limit_denominator(MAX_RANKS))
                + ("/tokens" if summary["loss"] == "per-token" else ""),
                module["bridge"] or "",
            )
        )
    return rows


_SIZES = {
    **{dim.upper(): SIZE_FIELDS[dim] for dim in ("tp", "cp", "pp", "dp", "ep")},
    "expert TP": "expert_tensor_parallel_size",
}


def _has_experts(module: Mapping[str, Any]) -> bool:
    """Whether a module's expert sizes are known and say more than its other sizes."""
    experts = module["expert_model_parallel_size"], module["expert_tensor_parallel_size"]
    return experts not in ((None, None), (1, module["tensor_model_parallel_size"]))


def describe(summary: Mapping[str, Any]) -> str:
    """A summary as plain text, to be printed or logged before the first step."""
    return f"{headline(summary)}\n{aligned(module_rows(summary))}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain text, each column as wide as it must be.

    Example:
        >>> print(aligned([("module", "ranks"), ("vision", "0-3")]))
        module  ranks
        vision  0-3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{plural if number != 1 else ''}"
