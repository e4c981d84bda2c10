"""Proposals as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from attrs import asdict

from megatron_mimo_coord.layout import runs_encoders_first
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.memory import PARTS, StageMemory
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.search import Proposal

GB = 1e9
SIZES = {
    "TP": "tensor_model_parallel_size",
    "CP": "context_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "DP": "data_parallel_size",
    "EP": "expert_model_parallel_size",
}


def headline(request: Request, count: int, is_given: bool) -> str:
    """What was asked, in a line."""
    what = "best layout" if count == 1 else f"{count} best layouts"
    return (
        f"{request.gpus:,} GPUs, {request.gpus_per_node} a node; {request.global_batch_size:,} "
        f"samples a step; the {'layout as given' if is_given else what}"
    )


def rows(proposals: Sequence[Proposal]) -> list[list[str]]:
    """A row for each layout, below a row of titles; idle are ranks that compute nothing."""
    names = list(proposals[0].modules)
    sizes = {
        name: {
            title: size
            for title, size in SIZES.items()
            if title in "TP PP DP"
            or any(getattr(each.modules[name], size) > 1 for each in proposals)
        }
        for name in names
    }
    is_uneven = any(each.seconds_in_slices != each.timeline.seconds for each in proposals)
    titles = [
        "",
        *(f"{name}\n{' '.join(sizes[name])}" for name in names),
        "micro\nbatch",
        "step\nseconds",
    ]
    titles += ["in\nslices"] if is_uneven else []
    titles += ["samples\n/s", "per\nGPU", "GPUs", "ranks", "empty"]
    titles += [*(f"{name}\nidle" for name in names), "free\nGB"]
    table = [titles]
    for index, each in enumerate(proposals, 1):
        shapes = [
            " ".join(f"{getattr(module, size):>2}" for size in sizes[name].values())
            for name, module in each.modules.items()
        ]
        table.append(
            [
                *(str(index), *shapes, str(each.micro_batch_size), f"{each.timeline.seconds:.4g}"),
                *([f"{each.seconds_in_slices:.4g}"] if is_uneven else []),
                f"{each.samples_per_second:.4g}",
                f"{each.samples_per_second / each.allocated:.4g}",
                str(each.allocated),
                "shared" if each.is_shared else "own",
                str(each.allocated - each.gpus),
                *(f"{each.ranks_idle(name):.0%}" for name in names),
                f"{each.headroom / GB:.1f}",
            ]
        )
    return table


def settings(proposals: Sequence[Proposal]) -> list[str]:
    """What each layout needs set besides its sizes, a line each."""
    lines = []
    for index, each in enumerate(proposals, 1):
        said = [
            f"{name} recomputes {'all layers' if sizes.recomputed == 'full' else sizes.recomputed}"
            for name, sizes in each.sizes.items()
            if sizes.recomputed
        ]
        for name, module in each.modules.items():
            if module.has_unequal_stages:
                layers = module.layers_of_stages(each.sizes[name].num_layers)
                said.append(f"{name} has stages of {', '.join(map(str, layers))} layers")
        if runs_encoders_first(each.grids):
            kept = each.how.get("encoder_microbatches")
            said.append("encoders before and after the pipeline")
            said += [] if kept is None else [f"encoder_microbatches = {kept}"]
        if said:
            lines.append(f"layout {index}: {'; '.join(said)}")
    return lines


def memory_rows(proposal: Proposal) -> list[list[str]]:
    """A row for each stage, below a row of titles; stages that hold the same share a row."""
    table = [["", "stage", "in\nflight", *PARTS, "total"]]
    for name in proposal.modules:
        stages = [held for (module, _), held in proposal.memory.items() if module == name]
        first = 0
        for stage, held in enumerate(stages):
            if stage + 1 < len(stages) and _shown(stages[stage + 1]) == _shown(held):
                continue
            label = f"{first}" if first == stage else f"{first}-{stage}"
            table.append([name, label, *_shown(held)])
            first = stage + 1
    return table


def _shown(held: StageMemory) -> list[str]:
    numbers = [getattr(held, part) for part in PARTS] + [held.total]
    return [str(held.microbatches), *(f"{number / GB:.2f}" for number in numbers)]


def as_json(proposal: Proposal) -> dict[str, Any]:
    """A proposal in types that JSON knows: seconds, bytes and shares."""
    return {
        "step_seconds": proposal.timeline.seconds,
        "step_seconds_in_slices": proposal.seconds_in_slices,
        "samples_per_second": proposal.samples_per_second,
        "samples_per_second_per_allocated_gpu": proposal.samples_per_second / proposal.allocated,
        "gpus": proposal.gpus,
        "allocated_gpus": proposal.allocated,
        "empty_gpus": proposal.allocated - proposal.gpus,
        "colocated": proposal.is_colocated,
        "encoders_first": runs_encoders_first(proposal.grids),
        "encoder_microbatches": proposal.how.get("encoder_microbatches"),
        "micro_batch_size": proposal.micro_batch_size,
        "num_microbatches": proposal.num_microbatches,
        "headroom_bytes": proposal.headroom,
        "modules": {
            name: {
                **asdict(module),
                **_recompute(proposal.sizes[name]),
                "ranks_idle": proposal.ranks_idle(name),
                "stages": [
                    {
                        **asdict(held),
                        "total": held.total,
                        "rank_total": proposal.rank_memory[key],
                        **asdict(proposal.timeline.stages[key]),
                    }
                    for key, held in proposal.memory.items()
                    if key[0] == name
                ],
            }
            for name, module in proposal.modules.items()
        },
    }


RECOMPUTE = ("granularity", "method", "num_layers", "modules")


def _recompute(sizes: ModuleSizes) -> dict[str, Any]:
    """What to set in a module's ``TransformerConfig``."""
    found = {f"recompute_{name}": getattr(sizes, f"recompute_{name}") for name in RECOMPUTE}
    if sizes.recompute_granularity != "selective":
        del found["recompute_modules"]
    return found
