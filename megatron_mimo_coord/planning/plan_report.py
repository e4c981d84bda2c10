"""Layouts as tables and as JSON."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from attrs import asdict

from megatron_mimo_coord.layout import SIZE_FIELDS, is_colocated, runs_encoders_first, span
from megatron_mimo_coord.planning.choices import Request
from megatron_mimo_coord.planning.layouts import GB, Layout
from megatron_mimo_coord.planning.memory import PARTS, StageMemory
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

SIZES = {dim.upper(): SIZE_FIELDS[dim] for dim in ("tp", "cp", "pp", "dp", "ep")}
IN_SLICES = "in\nslices"


def headline(request: Request, count: int, is_given: bool) -> str:
    """What was asked, in a line."""
    what = "best layout" if count == 1 else f"{count} best layouts"
    gpus = f"{request.gpus:,} GPU{'s' if request.gpus > 1 else ''}"
    return (
        f"{gpus}, {request.gpus_per_node} a node; {request.global_batch_size:,} "
        f"samples a step; the {'layout as given' if is_given else what}"
    )


def rows(layouts: Sequence[Layout]) -> list[list[str]]:
    """A row for each layout, below a row of titles; idle are ranks that compute nothing."""
    sizes = {
        name: [
            title
            for title, size in SIZES.items()
            if title in "TP PP DP" or any(getattr(each.modules[name], size) > 1 for each in layouts)
        ]
        for name in layouts[0].modules
    }
    table = [_cells(each, sizes) for each in layouts]
    if all(each.seconds_in_slices == each.timeline.seconds for each in layouts):
        for cells in table:
            del cells[IN_SLICES]
    numbered = ([str(index), *cells.values()] for index, cells in enumerate(table, 1))
    return [["", *table[0]], *numbered]


def _cells(layout: Layout, sizes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What a row says below each title, with some sizes of each module."""
    shapes = {
        f"{name}\n{' '.join(sizes[name])}": " ".join(
            f"{getattr(module, SIZES[title]):>2}" for title in sizes[name]
        )
        for name, module in layout.modules.items()
    }
    rate = layout.samples_per_second
    return {
        **shapes,
        "micro\nbatch": str(layout.micro_batch_size),
        "step\nseconds": f"{layout.timeline.seconds:.4g}",
        IN_SLICES: f"{layout.seconds_in_slices:.4g}",
        "samples\n/s": f"{rate:.4g}",
        "per\nGPU": f"{rate / layout.allocated:.4g}",
        "GPUs": str(layout.allocated),
        "ranks": "shared" if layout.is_shared else "own",
        "empty": str(layout.allocated - layout.gpus),
        **{f"{name}\nidle": f"{layout.ranks_idle(name):.0%}" for name in sizes},
        "free\nGB": f"{layout.headroom / GB:.1f}",
    }


def settings(layouts: Sequence[Layout]) -> list[str]:
    """What each layout needs set besides its sizes, a line each."""
    lines = []
    for index, each in enumerate(layouts, 1):
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


def memory_rows(layout: Layout) -> list[list[str]]:
    """A row for each stage, below a row of titles; stages that hold the same share a row."""
    table = [["", "stage", "in\nflight", *PARTS, "total"]]
    for name in layout.modules:
        stages = enumerate(held for (at, _), held in layout.memory.items() if at == name)
        for shown, alike in groupby(stages, key=lambda stage: _shown(stage[1])):
            first, *others = (index for index, _ in alike)
            table.append([name, span(range(first, first + len(others) + 1)), *shown])
    return table


def _shown(held: StageMemory) -> list[str]:
    numbers = [getattr(held, part) for part in PARTS] + [held.total]
    return [str(held.microbatches), *(f"{number / GB:.2f}" for number in numbers)]


def as_json(layout: Layout) -> dict[str, Any]:
    """A layout in types that JSON knows: seconds, bytes and shares."""
    return {
        "step_seconds": layout.timeline.seconds,
        "step_seconds_in_slices": layout.seconds_in_slices,
        "samples_per_second": layout.samples_per_second,
        "samples_per_second_per_allocated_gpu": layout.samples_per_second / layout.allocated,
        "gpus": layout.gpus,
        "allocated_gpus": layout.allocated,
        "empty_gpus": layout.allocated - layout.gpus,
        "colocated": len(layout.modules) > 1 and is_colocated(layout.grids.values()),
        "encoders_first": runs_encoders_first(layout.grids),
        "encoder_microbatches": layout.how.get("encoder_microbatches"),
        "micro_batch_size": layout.micro_batch_size,
        "num_microbatches": layout.num_microbatches,
        "headroom_bytes": layout.headroom,
        "modules": {
            name: {
                **asdict(module),
                **_recompute(layout.sizes[name]),
                "ranks_idle": layout.ranks_idle(name),
                "stages": [
                    {
                        **asdict(held),
                        "total": held.total,
                        "rank_total": layout.rank_memory[key],
                        **asdict(layout.timeline.stages[key]),
                    }
                    for key, held in layout.memory.items()
                    if key[0] == name
                ],
            }
            for name, module in layout.modules.items()
        },
    }


def _recompute(sizes: ModuleSizes) -> dict[str, Any]:
    """What to set in a module's ``TransformerConfig``."""
    found = asdict(sizes, filter=lambda field, _: field.name.startswith("recompute"))
    if sizes.recompute_granularity != "selective":
        del found["recompute_modules"]
    return found
