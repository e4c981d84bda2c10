"""A simulated step is Megatron's: its laws, and the real schedule on real ranks of any layout.

SIMULATED_LAYOUTS=40 in the environment draws as many layouts for the ranks.
"""

import os
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from layouts import parallel
from noting_stages import Job
from ranks import world

from megatron_mimo_coord import ModuleParallelism
from megatron_mimo_coord.layout import (
    LANGUAGE,
    default_topology,
    overlap,
    pack,
    ranks_taken,
    runs_encoders_first,
    stages_behind,
)
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.planning import Cluster, ModuleCosts, Timeline, simulate_step
from megatron_mimo_coord.planning.schedule import StageRanks, order

# Layouts that run on ranks, four of them by default: encoders that share ranks, are frozen, differ in
# depth; all colocated; a frozen language model behind a pipeline; TP.
FIRST = (5, 10, 44, 46)
SEEDS = [*FIRST, *(seed for seed in range(1000) if seed not in FIRST)]
DRAWN = SEEDS[: int(os.environ.get("SIMULATED_LAYOUTS", len(FIRST)))]
MAX_RANKS = 8


def costs(forward: float = 1.0, backward: float = 2.0, **more: Any) -> ModuleCosts:
    return ModuleCosts(
        forward_seconds_per_sample=forward, backward_seconds_per_sample=backward, **more
    )


# -- against the real schedule ---------------------------------------------------------------------


def draw_job(
    seed: int, pipelined: bool = True
) -> tuple[dict[str, ModuleParallelism], dict[str, ModuleCosts], int, int]:
    """Any layout that runs on at most 8 ranks: modules, costs, micro_batch_size, microbatches.

    With encoders on ranks of a pipelined language model too, if wanted.
    """
    random = Random(seed)
    while True:
        names = random.choice([[], *[["vision"]] * 4, *[["audio", "vision"]] * 5])
        colocated = bool(names) and random.random() < 0.2
        together = len(names) == 2 and random.random() < 0.3  # both encoders on the same ranks
        depth = random.choice([1, 1, 2, 3])
        modules = {}
        for name in [*names, LANGUAGE]:
            pp = depth if together and name != LANGUAGE else random.choice([1, 1, 2, 3, 4])
            offset = 0 if colocated or (together and name != LANGUAGE) else None
            sizes = {"tp": random.choice([1, 1, 2]), "dp": random.choice([1, 1, 2, 3, 4])}
            pp = 1 if colocated and not (pipelined and name == LANGUAGE) else pp
            modules[name] = parallel(**sizes, pp=pp, rank_offset=offset)
        grids = pack(modules)
        size = ranks_taken(grids.values())
        if not pipelined and runs_encoders_first(grids):
            continue
        if size <= MAX_RANKS and not layout_problems(grids, default_topology(grids), size):
            break
    whole = {}
    for name, module in modules.items():
        forward = random.uniform(0.5, 2) * module.pipeline_model_parallel_size
        layers = [random.choice([2, 3, 4]) for _ in range(module.pipeline_model_parallel_size)]
        whole[name] = costs(
            forward,
            forward * random.uniform(0.5, 2),
            tensor_parallel_efficiency=random.choice([0.6, 0.8, 1.0]),
            tensor_parallel_replicated_share=random.choice([0.0, 0.1]),
            frozen=random.random() < 0.25,
            recompute=random.random() < 0.25,
            imbalance=random.choice([1.0, 1.3]),
            layers_per_stage=layers if random.random() < 0.5 else None,
        )
    return modules, whole, 12, random.choice([1, 2, 3, 5, 8])


def hosts(modules: dict[str, ModuleParallelism], name: str) -> list[int]:
    """Stages of the language model on whose ranks an encoder lies."""
    grids = pack(modules)
    language = grids[LANGUAGE]
    length = language.size // language.dim("pp")
    stages = [language.ranks[stage * length :][:length] for stage in range(language.dim("pp"))]
    on = [stage for stage, ranks in enumerate(stages) if overlap(grids[name].ranks, ranks)]
    return on if name != LANGUAGE else []


def seconds_of_stages(
    modules: dict[str, ModuleParallelism], whole: dict[str, ModuleCosts], samples: int
) -> dict[str, list[tuple[float, float]]]:
    """(forward, backward) of each stage, by the words of the issue."""
    shared = any(hosts(modules, name) for name in modules)
    learns = [name for name in modules if name != LANGUAGE and not whole[name].frozen]
    result = {}
    for name, module in modules.items():
        cost, stages = whole[name], module.pipeline_model_parallel_size
        layers = cost.layers_per_stage or [1] * stages
        result[name] = []
        for stage in range(stages):
            unit = samples / module.data_parallel_size * layers[stage] / sum(layers)
            if module.tensor_model_parallel_size == 2:
                repeated = cost.tensor_parallel_replicated_share
                unit *= (1 + repeated) / 2 / cost.tensor_parallel_efficiency
            if module.data_parallel_size > 1:
                unit *= cost.imbalance
            backward = cost.backward_seconds_per_sample * (0.5 if cost.frozen else 1)
            backward += cost.forward_seconds_per_sample * cost.recompute
            others = [each for each in modules if each != LANGUAGE]
            receives = stage > 0 or (name == LANGUAGE and bool(learns if shared else others))
            if cost.frozen and not receives:
                backward = 0.0
            result[name].append((cost.forward_seconds_per_sample * unit, backward * unit))
    return result


@pytest.mark.parametrize("seed", DRAWN)
def test_the_real_schedule_does_the_same_in_the_same_order(seed):
    """What it takes is what ``examples/predict_and_measure.py`` measures."""
    modules, whole, samples, num_microbatches = draw_job(seed, pipelined=False)
    sizes = {"micro_batch_size": samples, "num_microbatches": num_microbatches}
    simulated = simulate_step(modules, whole, **sizes)
    grids = pack(modules)
    frozen = frozenset(name for name in modules if whole[name].frozen)
    job = Job(modules, frozen, **sizes)
    answers = world(ranks_taken(grids.values())).run("noting_stages:run_step", job)
    for rank, events in enumerate(answers):
        names = [name for name, grid in grids.items() if rank in grid.ranks]
        stage = grids[names[0]].coordinate(rank, "pp")
        assert_same_order(simulated, events, names, stage)
        warm_up = stages_behind(grids, names[0], stage)
        nothing_learns = not any(kind == "backward" for kind, _ in events)
        expected = [
            kind
            for kind, _ in order(num_microbatches, warm_up)
            if not (kind == "backward" and nothing_learns)
        ]
        assert without_repeats(kind for kind, _ in events) == expected


def without_repeats(kinds: Any) -> list[str]:
    """Modules on one rank compute one after the other in one event of the schedule."""
    kept: list[str] = []
    for kind in kinds:
        if kind not in kept[-1:]:
            kept.append(kind)
    return kept


def assert_same_order(
    simulated: Timeline, events: list[tuple[str, str]], names: list[str], stage: int
) -> None:
    """Forwards and backwards of the modules of a rank come in the order of the simulation."""
    computed = [event for event in events if event[0] in ("forward", "backward")]
    expected = [
        (span.kind, span.module)
        for span in simulated.spans
        if span.module in names and span.stage == stage and span.kind in ("forward", "backward")
    ]
    assert computed == expected


# -- laws ------------------------------------------------------------------------------------------

seconds = st.floats(0.01, 10)
drawn_jobs = st.integers(0, 10**6).map(draw_job)


@given(st.integers(1, 8), st.integers(1, 12), seconds, seconds)
def test_equal_stages_take_the_time_of_the_textbook(stages, num_microbatches, forward, backward):
    # (m + p - 1)(f + b): Narayanan et al. 2021, arXiv 2104.04473, 2.2.1
    timeline = simulate_step(
        {LANGUAGE: parallel(pp=stages, tp=2, dp=2)},
        {LANGUAGE: costs(forward, backward)},
        micro_batch_size=4,
        num_microbatches=num_microbatches,
    )
    unit = (forward + backward) / stages  # 4 samples on TP 2 x DP 2
    assert timeline.seconds == pytest.approx((num_microbatches + stages - 1) * unit)
    bubble = (stages - 1) / (num_microbatches + stages - 1)
    for shares in timeline.stages.values():
        assert shares.idle == pytest.approx(bubble, abs=1e-9)
        assert shares.waiting == 0


@given(drawn_jobs)
def test_every_second_of_a_stage_is_accounted_for(job):
    modules, whole, samples, num_microbatches = job
    timeline = simulate_step(
        modules, whole, micro_batch_size=samples, num_microbatches=num_microbatches
    )
    work = seconds_of_stages(modules, whole, samples)
    assert list(timeline.stages) == [
        (name, stage)
        for name, module in modules.items()
        for stage in hosts(modules, name) or range(module.pipeline_model_parallel_size)
    ]
    for (name, stage), shares in timeline.stages.items():
        assert min(shares.busy, shares.waiting, shares.idle) >= 0
        assert shares.busy + shares.waiting + shares.idle == pytest.approx(1)
        own = 0 if hosts(modules, name) else stage
        expected = num_microbatches * sum(work[name][own])
        assert shares.busy * timeline.seconds == pytest.approx(expected)
        spans = [span for span in timeline.spans if (span.module, span.stage) == (name, stage)]
        assert all(0 <= span.start <= span.end <= timeline.seconds for span in spans)
        assert all(left.end <= right.start for left, right in pairwise(spans))
        for kind, unit in zip(("forward", "backward"), work[name][own], strict=True):
            computed = [span.microbatch for span in spans if span.kind == kind]
            assert computed == (list(range(num_microbatches)) if unit else [])
    for kind, step in (("forward", 1), ("backward", -1)):  # no stage before the one it waits for
        for name, module in modules.items():
            ends = [
                [
                    span.end
                    for span in timeline.spans
                    if (span.module, span.stage) == (name, stage) and span.kind == kind
                ]
                for stage in range(module.pipeline_model_parallel_size)
            ][::step]
            if kind == "backward" and not ends[-1]:
                del ends[-1]  # a frozen encoder's first stage has none
            assert all(
                a <= b for one, other in pairwise(ends) for a, b in zip(one, other, strict=True)
            )


@given(drawn_jobs, st.data())
def test_what_costs_more_takes_no_less(job, data):
    modules, whole, samples, num_microbatches = job
    sizes = {"micro_batch_size": samples, "num_microbatches": num_microbatches}
    name = data.draw(st.sampled_from(list(modules)))
    field = data.draw(
        st.sampled_from(
            ["forward_seconds_per_sample", "backward_seconds_per_sample", "gradient_bytes",
             "optimizer_seconds", "activation_bytes_per_sample", "output_bytes_per_sample"]
        )
    )  # fmt: skip
    dearer = {**whole, name: evolve(whole[name], **{field: getattr(whole[name], field) + 1})}
    links = Cluster(node_bytes_per_second=10, node_latency_seconds=0.01)
    before = simulate_step(modules, whole, **sizes, cluster=links).seconds
    assert simulate_step(modules, dearer, **sizes, cluster=links).seconds >= before - 1e-9
    assert before >= simulate_step(modules, whole, **sizes).seconds - 1e-9


def test_messages_take_their_time():
    # One microbatch of 4 samples: every message is on the way alone.
    whole = {
        "vision": costs(1, 2, output_bytes_per_sample=100, activation_bytes_per_sample=10),
        LANGUAGE: costs(1, 2, activation_bytes_per_sample=30),
    }
    modules = {"vision": parallel(pp=2, dp=2), LANGUAGE: parallel(pp=2)}
    links = Cluster(
        ranks_per_node=2,
        node_latency_seconds=0.5,
        node_bytes_per_second=1000,
        network_latency_seconds=3,
        network_bytes_per_second=10,
    )
    timeline = simulate_step(modules, whole, micro_batch_size=4, num_microbatches=1, cluster=links)
    computing = 2 * 3 + 4 * 3  # each encoder rank has 2 samples, the language model 4
    between_encoder_stages = 3 + 10 * 2 / 10  # ranks 0 and 2
    over_the_bridge = 3 + 2 * 100 * 2 / 10  # ranks 2 and 3 to rank 4, at once
    between_language_stages = 0.5 + 30 * 4 / 1000  # ranks 4 and 5
    messages = between_encoder_stages + over_the_bridge + between_language_stages
    assert timeline.seconds == pytest.approx(computing + 2 * messages)
    waited = timeline.stages["vision", 1].waiting * timeline.seconds
    # All but its work, what the first encoder stage does before and after, and its messages.
    assert waited == pytest.approx(timeline.seconds - 2 * 3 - 2 * between_encoder_stages)


def test_the_end_of_a_step():
    # Stage 0 ends its backward last; what comes behind it is stage 0's.
    whole = {LANGUAGE: costs(1, 2, gradient_bytes=80, optimizer_seconds=12)}
    modules = {LANGUAGE: parallel(pp=2, dp=4, tp=2)}
    sizes = {"micro_batch_size": 16, "num_microbatches": 2}
    links = Cluster(node_bytes_per_second=1)
    computing = simulate_step(modules, {LANGUAGE: costs(1, 2)}, **sizes).seconds
    timeline = simulate_step(modules, whole, **sizes, cluster=links)
    reduction = 2 * 3 / 4 * 80 / 2 / 2
    assert timeline.seconds == pytest.approx(computing + reduction + 12 / 2 / 2)
    sharded = simulate_step(modules, whole, **sizes, cluster=links, distributed_optimizer=True)
    assert sharded.seconds == pytest.approx(computing + reduction + 12 / 2 / 2 / 4)
    starts = [span.start for span in sharded.spans if span.kind == "optimizer"]
    assert starts == pytest.approx([computing + reduction] * 2), "norms wait for all ranks"


def test_colocated_modules_exchange_tokens_where_dp_differs():
    whole = {"vision": costs(output_bytes_per_sample=10), LANGUAGE: costs()}
    links = Cluster(node_bytes_per_second=10)

    def simulated(vision_dp: int) -> float:
        vision = parallel(dp=vision_dp, tp=4 // vision_dp, rank_offset=0)
        modules = {"vision": vision, LANGUAGE: parallel(dp=1, tp=4, rank_offset=0)}
        sizes = {"micro_batch_size": 4, "num_microbatches": 2}
        return simulate_step(modules, whole, **sizes, cluster=links).seconds

    # Three ranks' tokens of one sample each, forward and backward, for two microbatches.
    assert simulated(4) - simulated(1) == pytest.approx(3 * 10 / 10 * 2 * 2)


ENCODER = costs(1, 2, output_bytes_per_sample=10, gradient_bytes=20, optimizer_seconds=4)
STAGES = costs(2, 4, gradient_bytes=60, optimizer_seconds=2)


def phases(**options: Any) -> Timeline:
    """Vision DP 4 on the four ranks of a language model of PP 2 and DP 2; 2 microbatches of 4."""
    modules = {
        "vision": parallel(dp=4, rank_offset=0),
        LANGUAGE: parallel(pp=2, dp=2, rank_offset=0),
    }
    links = Cluster(node_bytes_per_second=10)
    whole = {"vision": ENCODER, LANGUAGE: STAGES}
    sizes = {"micro_batch_size": 4, "num_microbatches": 2}
    return simulate_step(modules, whole, **sizes, cluster=links, **options)


def test_encoders_on_ranks_of_a_pipeline_run_before_and_after_it():
    timeline = phases()
    # Two samples in turn on each rank; the first stage's ranks then get two microbatches of two
    # messages of 10 bytes. Two microbatches of 2 samples on two stages of 1 + 2 s a sample.
    tokens, pipeline = 2 * 2 * 10 / 10, (2 + 1) * 2 * (1 + 2)
    at = [0, 2, 2 + tokens]
    spans = {
        (span.module, span.stage, span.kind, span.microbatch): (span.start, span.end)
        for span in timeline.spans
    }
    for stage in range(2):
        assert spans["vision", stage, "forward", 1] == (1, 2)
    assert spans[LANGUAGE, 0, "forward", 0][0] == at[2]
    over = at[2] + pipeline
    assert spans[LANGUAGE, 0, "backward", 1][1] == over
    back = over + tokens  # as many bytes
    for stage in range(2):
        assert spans["vision", stage, "backward", 0] == (back, back + 2)
        assert spans["vision", stage, "backward", 1] == (back + 2, back + 4)
    # The language model's sum of 30 bytes over 2 ranks takes 3 s, and the encoders compute 4 s.
    assert spans[LANGUAGE, 0, "reduce_gradients", None] == (back + 4, back + 4)
    reduced = back + 4 + 2 * 3 * 20 / 4 / 10
    assert timeline.seconds == pytest.approx(reduced + 1 + 4)
    assert phases(encoder_microbatches=1).seconds == pytest.approx(timeline.seconds + 1)
    assert phases(encoder_microbatches=0).seconds == pytest.approx(timeline.seconds + 2)


@pytest.mark.parametrize(("replicas", "samples"), [(2, 16), (4, 16), (8, 32), (64, 256)])
def test_uneven_images_keep_the_largest_rank_busy(replicas, samples):
    random, largest = Random(0), []
    shape, mean, deviation = (2.7 / 2.5) ** 2, 2.7, 2.5
    for _ in range(400):
        images = [random.gammavariate(shape, mean / shape) for _ in range(samples)]
        ranks = [sum(images[rank::replicas]) for rank in range(replicas)]
        largest.append(max(ranks) / (samples * mean / replicas))
    drawn = sum(largest) / len(largest)
    uneven = costs(images_per_sample=mean, images_per_sample_deviation=deviation)
    assert uneven.unevenness(replicas, samples) == pytest.approx(drawn, rel=0.04)
    assigned = evolve(uneven, images_assigned=True)
    assert 1 < assigned.unevenness(replicas, samples) < 1.06
    vision = parallel(dp=replicas)
    times = [each.forward_seconds(vision, 0, samples) for each in (uneven, assigned, costs())]
    assert times[0] / times[2] == pytest.approx(uneven.unevenness(replicas, samples))
    assert times[1] / times[2] == pytest.approx(assigned.unevenness(replicas, samples))
    assert uneven.unevenness(replicas, samples * 10_000) < 1.02, "over many samples they even out"


def test_an_encoder_inside_the_first_stage_runs_with_each_microbatch():
    modules = {"vision": parallel(rank_offset=0), LANGUAGE: parallel(pp=2, rank_offset=0)}
    whole = {"vision": costs(1, 2), LANGUAGE: costs(2, 4)}
    sizes = {"micro_batch_size": 1, "num_microbatches": 3}
    inside = simulate_step(modules, whole, **sizes, encoders_first=False)
    # The first stage computes 2 + 4 s a microbatch, and waits from 4 to 5 for its first gradient.
    assert inside.seconds == 3 * (2 + 4) + 1
    assert inside.stages[LANGUAGE, 1].busy == pytest.approx(3 * 3 / inside.seconds)
    apart = {"vision": parallel(dp=2, rank_offset=0), LANGUAGE: parallel(pp=2, rank_offset=0)}
    with pytest.raises(ValueError, match="ranks behind the 1 of the language model's first stage"):
        simulate_step(apart, whole, micro_batch_size=2, num_microbatches=1, encoders_first=False)


def test_what_is_asked_for_wrongly_is_told_at_once():
    modules = {"vision": parallel(dp=3), LANGUAGE: parallel(dp=2, pp=2)}
    with pytest.raises(ValueError) as error:
        simulate_step(
            modules,
            {LANGUAGE: costs(layers_per_stage=[1, 2, 3])},
            micro_batch_size=8,
            num_microbatches=2,
        )
    message = str(error.value)
    assert "neither divides the other" in message
    assert "micro_batch_size 8 is not divisible by the DP 3" in message
    assert "there are no costs of module vision (costs of: language)" in message
    assert "module language: layers_per_stage (1, 2, 3) is for 3 pipeline stages" in message
    last = {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1}
    unequal = {LANGUAGE: ModuleParallelism(**last)}
    with pytest.raises(ValueError, match="stages of unequal numbers of layers, but its costs"):
        simulate_step(unequal, {LANGUAGE: costs()}, micro_batch_size=1, num_microbatches=1)


def test_a_large_step_looks_at_each_event_a_few_times_at_most(monkeypatch):
    looked = 0
    go_on = StageRanks.go_on

    def counted(place: StageRanks) -> bool:
        nonlocal looked
        looked += 1
        return go_on(place)

    monkeypatch.setattr(StageRanks, "go_on", counted)
    timeline = simulate_step(
        {LANGUAGE: parallel(pp=64)}, {LANGUAGE: costs()}, micro_batch_size=1, num_microbatches=1024
    )
    assert timeline.seconds == pytest.approx((1024 + 63) * 3 / 64)
    assert looked < 2 * 64 * 1024, "a stage is looked at when what it waits for is there"


@given(st.integers(1, 40), st.integers(0, 20))
def test_no_more_microbatches_are_in_flight_than_stages_behind(num_microbatches, warm_up):
    in_flight = most = 0
    for kind, _ in order(num_microbatches, warm_up):
        in_flight += (kind == "forward") - (kind == "backward")
        most = max(most, in_flight)
    assert in_flight == 0
    assert most == min(num_microbatches, warm_up + 1)
