"""A recorded timeline says what every rank did, and nothing stays of it afterwards."""

import json
import tomllib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from cases import PATCHES, Case, _data, built, optimizer_of, run_schedule
from layouts import COLOCATED, LAYOUTS, SHARDED, layout_name, parallel
from ranks import world

from megatron_mimo_coord.gradients import profiler_ranges
from megatron_mimo_coord.layout import pack
from megatron_mimo_coord.planning import ModuleCosts, simulate_step

STEPS, MICROBATCHES = 2, 3
SECONDS = 0.01  # that each forward of an encoder sleeps, and each batch until it is there
TOGETHER = {
    "vision": parallel(dp=2, rank_offset=0),
    "audio": parallel(dp=2, rank_offset=0),
    "language": parallel(rank_offset=2),
}
AROUND = {
    "vision": parallel(dp=2, rank_offset=0),
    "language": parallel(pp=2, rank_offset=0),
}


def _slow(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        sleep(SECONDS)
        yield batch


def _record(case: Case, folder: str) -> dict[str, Any]:
    """Run four steps and evaluate after each; the second and third are recorded."""
    infra, model, coordinator = built(case)
    optimizer = optimizer_of(case, coordinator)
    coordinator.attach(model.config, optimizer)
    communicator = coordinator.build_pipeline_communicator(model.config)
    for encoder in model.modality_submodules.values():
        encoder.module.register_forward_pre_hook(lambda *_: sleep(SECONDS))
    owners = [optimizer, communicator]
    before = [dict(vars(owner)).keys() for owner in owners]
    path = Path(folder, "timeline.json")
    recording = coordinator.record_timeline(path, range(1, 1 + STEPS), gpus_per_node=8)
    for step in range(4):
        if case.zeroed_by_ddp:
            for ddp, _ in coordinator.module_to_grid_tuples:
                ddp.zero_grad_buffer()
        else:
            coordinator.zero_grad_buffer()
        run_schedule(case, model, coordinator, communicator, _slow(_data(case, step)))
        optimizer.step()
        run_schedule(case, model, coordinator, communicator, _data(case, step), forward_only=True)
    assert before == [vars(owner).keys() for owner in owners], "nothing is left behind"
    assert not profiler_ranges.observers
    weights = coordinator.num_trainable_parameters()
    model.destroy()
    infra.destroy()
    if recording.summary is None:
        return {}
    return {
        "text": str(recording.summary),
        "modules": dict(recording.summary.modules),
        "samples": recording.summary.samples_per_second * recording.summary.seconds,
        "weights": weights,
        "gpus": (recording.summary.used_gpus, recording.summary.allocated_gpus),
    }


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["fan-in, pipeline"],
        COLOCATED,
        TOGETHER,
        AROUND,
    ],
    ids=layout_name,
)
def test_every_rank_is_recorded(layout, tmp_path):
    by_ddp = layout == COLOCATED
    case = Case(modules=layout, num_microbatches=MICROBATCHES, ddp=SHARDED, zeroed_by_ddp=by_ddp)
    first, *others = world(case.world_size).run(_record, case, str(tmp_path))
    assert others == [{}] * len(others), "rank 0 alone has the summary"
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [event for event in events if event["ph"] == "X"]
    for pid, module in names.items():
        ranks = {event["tid"] for event in spans if event["pid"] == pid}
        for kind, times in (
            ("forward", MICROBATCHES),
            ("backward", MICROBATCHES),
            ("reduce_gradients", 1),
            ("optimizer", 1),
        ):
            here = [e for e in spans if e["cat"] == kind and e["pid"] == pid]
            assert len(here) == STEPS * times * len(ranks), (module, kind)
            least = SECONDS * 1e6 if kind == "forward" and module != "language" else 0
            durations = [event["dur"] for event in here]
            assert least < min(durations) and max(durations) < 30e6, "microseconds"
    read = [event for event in spans if event["cat"] == "data"]
    assert len(read) == STEPS * MICROBATCHES * case.world_size
    if layout != AROUND:  # where the language model's turn finds all batches read
        assert min(event["dur"] for event in read) > 0.99e6 * SECONDS
    for rank in {event["tid"] for event in spans}:
        on_rank = [e for e in spans if e["tid"] == rank and e["cat"] != "finalize"]
        on_rank.sort(key=lambda event: event["ts"])
        ends = [event["ts"] + event["dur"] for event in on_rank]
        overlaps = [e for e, end in zip(on_rank[1:], ends, strict=False) if e["ts"] < end - 1]
        assert not overlaps, "a rank does one thing at a time"
        for event, following in pairwise(on_rank):
            if event["cat"] == "data":
                number = event["args"]["microbatch"]
                assert (following["cat"], following["args"]["microbatch"]) == ("forward", number)
    assert_simulated_order(case, spans, names)
    assert first["samples"] == pytest.approx(MICROBATCHES * case.micro_batch_size)
    assert first["gpus"] == (case.world_size, 8)
    assert all(
        0 <= share <= 1
        for shares in first["modules"].values()
        for share in (shares.busy, shares.waiting, shares.idle)
    )
    assert "samples/s" in first["text"]
    tables = tomllib.loads((tmp_path / "costs.toml").read_text())
    costs = {name: ModuleCosts(**table) for name, table in tables.items()}
    assert set(costs) == set(layout)
    for name, each in costs.items():
        # Each of a module's ranks sleeps once a microbatch, and costs are those of one rank.
        replicas = layout[name].data_parallel_size if name != "language" else 0
        assert replicas * SECONDS < each.forward_seconds_per_sample * case.micro_batch_size < 30
        weights = first["weights"][name]
        assert 4 * weights <= each.gradient_bytes < 8 * weights, "fp32, padded for its shards"
    hidden, itemsize = 16, 4  # the encoders project to the language model's hidden size
    for name in costs.keys() - {"language"}:
        assert costs[name].output_bytes_per_sample == PATCHES * hidden * itemsize, name


def assert_simulated_order(case: Case, spans: list[dict[str, Any]], names: dict[int, str]) -> None:
    """Each rank computes what it does in a simulated step, in the same order."""
    grids = pack(case.modules)
    costs = ModuleCosts(forward_seconds_per_sample=1, backward_seconds_per_sample=2)
    simulated = simulate_step(
        case.modules,
        dict.fromkeys(case.modules, costs),
        micro_batch_size=case.micro_batch_size,
        num_microbatches=MICROBATCHES,
    )
    for rank in range(case.world_size):
        here = [name for name, grid in grids.items() if rank in grid.ranks]
        stage = max(grids[name].coordinate(rank, "pp") for name in here)
        expected = [
            (span.kind, span.module, span.microbatch)
            for span in simulated.spans
            if span.module in here and span.stage == stage and span.kind in ("forward", "backward")
        ]
        on_rank = [e for e in spans if e["tid"] == rank and e["cat"] in ("forward", "backward")]
        on_rank.sort(key=lambda event: event["ts"])
        computed = [(e["cat"], names[e["pid"]], e["args"]["microbatch"]) for e in on_rank]
        assert computed == STEPS * expected, rank


def _cut_short(case: Case, zeroes: bool, folder: str) -> list[str]:
    """What is logged when the coordinator ends after one step of three; with no optimizer."""
    import logging

    infra, model, coordinator = built(case)
    coordinator.attach(model.config)
    communicator = coordinator.build_pipeline_communicator(model.config)
    path = Path(folder, "timeline.json")
    coordinator.record_timeline(path)
    if zeroes:
        coordinator.zero_grad_buffer()
    run_schedule(case, model, coordinator, communicator, _data(case, 0))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mimo_coord").addHandler(handler)
    try:
        coordinator.close()
    finally:
        logging.getLogger("megatron_mimo_coord").removeHandler(handler)
    assert not profiler_ranges.observers and not path.exists()
    model.destroy()
    infra.destroy()
    return said


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_recording_that_sees_too_few_steps_says_so(zeroes, tmp_path):
    for (text,) in world(2).run(
        "test_timeline:_cut_short", Case(modules=COLOCATED), zeroes, str(tmp_path)
    ):
        assert text.startswith(f"record_timeline saw {int(zeroes)} of 3 steps begin")
        assert "a step begins with zero_grad_buffer" in text
