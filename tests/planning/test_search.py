"""The search returns what brute force over every layout finds."""

from collections.abc import Iterator
from itertools import combinations, permutations, product
from math import inf

import pytest
from attrs import evolve
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from layouts import parallel

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleParallelism,
    default_topology,
    pack,
    runs_encoders_first,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.planning import Cluster, ModuleCosts, simulate_step
from megatron_mimo_coord.planning.choices import Request, choices
from megatron_mimo_coord.planning.memory import layout_memory, rank_totals
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.search import Candidates, closest, propose
from megatron_mimo_coord.planning.size_problems import sharding_problems

VISION = ModuleSizes(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    tokens_per_image=4,
    patch_size=12,
    recompute_granularity="none",
)
WORDS = ModuleSizes(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=64,
    seq_length=16,
    use_distributed_optimizer=True,
    recompute_granularity="none",
)

times = st.sampled_from([0.0, 0.001, 0.01, 0.013, 0.1])
costs = st.builds(
    ModuleCosts,
    forward_seconds_per_sample=st.sampled_from([0.001, 0.01, 0.017, 0.1]),
    backward_seconds_per_sample=st.sampled_from([0.002, 0.02, 0.05, 0.2]),
    output_bytes_per_sample=st.sampled_from([0.0, 1.0, 50.0]),
    activation_bytes_per_sample=st.sampled_from([0.0, 1.0, 50.0]),
    gradient_bytes=st.sampled_from([0.0, 100.0]),
    optimizer_seconds=times,
    tensor_parallel_efficiency=st.sampled_from([1.0, 0.7]),
    frozen=st.booleans(),
    recompute=st.booleans(),
    imbalance=st.sampled_from([1.0, 1.5]),
)
clusters = st.builds(
    Cluster,
    ranks_per_node=st.sampled_from([2, 4]),
    node_latency_seconds=st.sampled_from([0.0, 0.001]),
    node_bytes_per_second=st.sampled_from([inf, 1e4]),
    network_latency_seconds=st.sampled_from([0.0, 0.002]),
    network_bytes_per_second=st.sampled_from([inf, 2e3]),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    names = draw(
        st.sampled_from(
            [
                (LANGUAGE,),
                ("vision", LANGUAGE),
                ("vision", "audio", LANGUAGE),
                ("vision", "audio", "video", LANGUAGE),
            ]
        )
    )
    known = {name: draw(costs) for name in names}
    gpus = draw(st.integers(2, 6)) if len(names) < 3 else draw(st.integers(len(names), 4))
    return Request(
        sizes={name: WORDS if name == LANGUAGE else VISION for name in names},
        gpus=gpus,
        gpus_per_node=draw(st.sampled_from([2, 4])),
        global_batch_size=draw(st.sampled_from([4, 6])),
        memory_bytes=draw(st.sampled_from([1e9, 2.0e6, 0.8e6])),
        costs=lambda name, *_: known[name],
        cluster=draw(clusters),
    )


Found = tuple[dict[str, ModuleParallelism], int, int | None]


def every_layout(request: Request, contexts: tuple[int, ...] = (1,)) -> Iterator[Found]:
    """Every layout that runs and fits, with microbatch and encoder_microbatches, by brute force."""
    gpus, batch = request.gpus, request.global_batch_size
    numbers = range(1, gpus + 1)
    every = [
        parallel(tp, pp, dp)
        for tp, pp, dp in product(numbers, repeat=3)
        if tp * pp * dp <= gpus and request.gpus_per_node % tp == 0
    ]
    in_parts = [evolve(each, context_parallel_size=cp) for each in every for cp in contexts]
    for chosen in product(*[every] * (len(request.sizes) - 1), in_parts):
        modules = dict(zip(request.sizes, chosen, strict=True))
        ranks = [module.size for module in chosen]
        if sum(ranks) > gpus and max(ranks) != ranks[-1]:
            continue
        if any(
            any(sharding_problems(name, request.sizes[name], modules[name])) for name in modules
        ):
            continue
        larger_first = sorted(modules, key=lambda name: -modules[name].size)
        placed = [_placed(modules, order) for order in permutations(larger_first)]
        whole = (each for each in placed if _keeps_tp_whole(each))
        together = {name: evolve(module, rank_offset=0) for name, module in modules.items()}
        stage = ranks[-1] // chosen[-1].pipeline_model_parallel_size
        may_share = len(modules) > 1 and all(
            size <= ranks[-1] and size % stage == 0 for size in ranks[:-1]
        )
        for layout in filter(None, (next(whole, None), together if may_share else None)):
            grids = pack(layout)
            ranks = max(grid.ranks.stop for grid in grids.values())
            if ranks > gpus or layout_problems(grids, default_topology(grids), ranks):
                continue
            for samples in range(1, batch + 1):
                if batch_problems(grids.values(), batch, samples):
                    continue
                for kept in [None, 0] if runs_encoders_first(grids) else [None]:
                    if fullest(request, layout, samples, kept) <= request.memory_bytes:
                        yield layout, samples, kept


def _placed(modules, order):
    offsets, offset = {}, 0
    for name in order:
        offsets[name], offset = offset, offset + modules[name].size
    return {name: evolve(module, rank_offset=offsets[name]) for name, module in modules.items()}


def _keeps_tp_whole(layout):
    return all(
        module.rank_offset % module.tensor_model_parallel_size == 0 for module in layout.values()
    )


def seconds(request, layout, samples, kept=None):
    return simulate_step(
        layout,
        {name: request.costs(name, None, module) for name, module in layout.items()},
        encoder_microbatches=kept,
        micro_batch_size=samples,
        num_microbatches=request.global_batch_size // samples,
        cluster=request.cluster,
        distributed_optimizer=request.distributed_optimizer,
    ).seconds


def rank(request, layout, took):
    """(seconds of a step, seconds of all GPUs of the nodes it takes, GPUs)."""
    ranks = max(grid.ranks.stop for grid in pack(layout).values())
    nodes = -(-ranks // request.gpus_per_node)
    return took, took * min(nodes * request.gpus_per_node, request.gpus)


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(requests())
def test_the_best_is_the_best_of_all_layouts(request):
    assume(len(request.sizes) < 4)
    ranked = [
        rank(request, layout, seconds(request, layout, *how))
        for layout, *how in every_layout(request)
    ]
    for index, per_gpu in enumerate((False, True)):
        found = [
            rank(request, each.modules, seconds(request, each.modules, *batch(each)))
            for each in propose(request, 4, per_gpu=per_gpu)
        ]
        assert bool(found) == bool(ranked)
        assert found == sorted(found, key=lambda each: each[index])
        if found:
            least = min(each[index] for each in ranked)
            assert least <= found[0][index] * (1 + 1e-9) <= 1.05 * least, "a formula chose them"


def test_context_parallelism_is_searched(monkeypatch):
    """With one sample there are no replicas; the ranks share its sequence, as far as it pays."""
    monkeypatch.setattr("megatron_mimo_coord.planning.choices.LEAST_TOKENS", 4)
    known = ModuleCosts(
        forward_seconds_per_sample=1, backward_seconds_per_sample=2, gradient_bytes=3,
        context_parallel_efficiency=0.9, tensor_parallel_efficiency=0.7, output_bytes_per_sample=1,
    )  # fmt: skip
    request = Request(
        sizes={"vision": VISION, LANGUAGE: WORDS},
        gpus=6,
        gpus_per_node=2,
        global_batch_size=1,
        memory_bytes=1e9,
        costs=lambda *_: known,
        cluster=Cluster(ranks_per_node=2, network_bytes_per_second=50),
    )
    every = list(every_layout(request, contexts=(1, 2, 4)))
    least = min(seconds(request, layout, *how) for layout, *how in every)
    best, *_ = propose(request, 1)
    assert best.timeline.seconds == pytest.approx(least)
    assert best.modules[LANGUAGE].context_parallel_size > 1
    assert {each[0][LANGUAGE].context_parallel_size for each in every} == {1, 2, 4}


def batch(proposal):
    return proposal.micro_batch_size, proposal.how.get("encoder_microbatches")


def of_language(layout):
    """What the language model of a layout is like, wherever it lies."""
    offsets = {module.rank_offset for module in layout.values()}
    shared = len(layout) > 1 and offsets == {0}
    return evolve(layout[LANGUAGE], rank_offset=None), shared


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(requests())
def test_each_language_layout_is_listed_with_its_best_encoders_once(request):
    assume(len(request.sizes) < 3)
    least: dict[tuple, float] = {}
    for layout, *how in every_layout(request):
        key = of_language(layout)
        least[key] = min(least.get(key, inf), seconds(request, layout, *how))
    found: dict[tuple, list[tuple[float, tuple[int, int]]]] = {}
    for each in propose(request, 1000):
        assert each.headroom >= 0
        assert fullest(request, each.modules, *batch(each)) <= request.memory_bytes
        listed = found.setdefault(of_language(each.modules), [])
        listed.append((each.timeline.seconds, (each.micro_batch_size, each.allocated)))
    assert found.keys() == least.keys()
    for key, listed in found.items():
        assert listed[0][0] == pytest.approx(least[key], rel=0.1)
        for (one, kind), (other, its) in combinations(listed, 2):
            assert kind != its or other > one * 1.01, "a row for each that takes longer"


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(requests())
def test_the_formula_ranks_by_about_what_is_simulated(request):
    """Without messages, a backward pass twice as long as a forward pass; frozen modules too."""
    assume(
        len(request.sizes) < 3
    )  # with several encoders, a first stage also waits for each in turn
    assume(not all(request.costs(name, None, parallel()).frozen for name in request.sizes))

    def twice(name, sizes, module):
        known = request.costs(name, sizes, module)
        return evolve(known, backward_seconds_per_sample=2 * known.forward_seconds_per_sample)

    free = evolve(request, cluster=Cluster(), costs=twice)
    for layout in Candidates(free, {name: choices(free, name) for name in free.sizes}):
        took = seconds(free, layout.modules, *batch(layout))
        assert layout.seconds == pytest.approx(took, rel=0.3), str(layout)


def fullest(request, layout, samples, kept=None):
    memory = layout_memory(
        layout,
        request.sizes,
        encoder_microbatches=kept,
        micro_batch_size=samples,
        num_microbatches=request.global_batch_size // samples,
    )
    return max(rank_totals(pack(layout), memory).values())


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(requests())
def test_the_closest_has_the_least_memory_of_all_layouts(request):
    assume(len(request.sizes) < 4)
    everything = every_layout(evolve(request, memory_bytes=inf))
    least = min(fullest(request, *each) for each in everything)
    short = evolve(request, memory_bytes=least / 2)
    assert not propose(short, 1)
    found, reasons = closest(short)
    held = fullest(request, found.modules, *batch(found))
    assert least <= held <= 1.02 * least
    assert found.headroom == pytest.approx(least / 2 - held)
    assert reasons[0].startswith("closest is ")


def large(layers: tuple[int, ...], batch: int, memory_bytes: float) -> Request:
    """On 1,024 GPUs, with as many encoders as there are numbers of layers."""
    from megatron_mimo_coord.planning.estimates import Accelerator, estimated_costs

    encoders = {
        name: ModuleSizes(
            num_layers=number, hidden_size=1024, num_attention_heads=16, tokens_per_image=576
        )
        for name, number in zip(("vision", "audio", "video"), layers, strict=False)
    }
    words = ModuleSizes(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=128_000,
        seq_length=4096,
        params_dtype="bf16",
        use_distributed_optimizer=True,
    )
    cluster = Cluster(ranks_per_node=8, node_bytes_per_second=300e9, network_bytes_per_second=40e9)
    return Request(
        sizes={**encoders, LANGUAGE: words},
        gpus=1024,
        gpus_per_node=8,
        global_batch_size=batch,
        memory_bytes=memory_bytes,
        costs=lambda _, sizes, module: estimated_costs(sizes, module, 4096, Accelerator(), cluster),
        cluster=cluster,
    )


@pytest.mark.parametrize(
    ("layers", "batch", "memory_bytes", "most"),
    [((24,), 2048, 80e9, 100), ((24, 12, 48), 1024, 16e9, 120), ((24, 12, 48), 720, 24e9, 120)],
)
def test_few_steps_are_simulated(monkeypatch, layers, batch, memory_bytes, most):
    """Counted, not timed: 1,024 GPUs have hundreds of thousands of layouts and microbatches."""
    import megatron_mimo_coord.planning.layouts as layouts

    simulated = []
    monkeypatch.setattr(
        layouts,
        "simulate_step",
        lambda *args, **how: simulated.append(args) or simulate_step(*args, **how),
    )
    assert len(propose(large(layers, batch, memory_bytes), 10)) == 10
    assert 10 <= len(simulated) <= most


def test_little_is_looked_at_where_nothing_fits(monkeypatch):
    """Memory of stages is counted: what does not fit alone is not combined with anything."""
    from megatron_mimo_coord.planning import choices as ways

    stages, stage_memory = [], ways.stage_memory
    monkeypatch.setattr(
        ways,
        "stage_memory",
        lambda *args, **how: stages.append(args) or stage_memory(*args, **how),
    )
    request = large((24, 12, 48), 1024, 0.3e9)
    assert propose(request, 10) == []
    _, reasons = closest(request)
    assert "65,536 GPUs would not do either" in reasons[-1]
    assert 1_000 < len(stages) < 30_000
