"""Where the time of steps went, and what each module costs: by hand, from spans that are known."""

import tomllib

import pytest

from megatron_mimo_coord.layout import ModuleGrid
from megatron_mimo_coord.metrics.measured_costs import RankBytes, measured_costs, to_toml
from megatron_mimo_coord.metrics.step_summary import StepSummary, data_parallel_imbalance
from megatron_mimo_coord.planning import ModuleCosts
from megatron_mimo_coord.planning.timeline import StageShares

DIMS = ("tp", "cp", "dp", "pp")
GRIDS = {
    "vision": ModuleGrid("vision", (1, 1, 2, 1), DIMS),
    "language": ModuleGrid("language", (1, 1, 1, 2), DIMS, rank_offset=2),
}
MICRO_BATCH_SIZE, NUM_MICROBATCHES = 8, 2


def step(scale: float) -> dict:
    """A step of 10 seconds, or of as many times as long."""
    from megatron_mimo_coord.planning.timeline import Span

    def spans(module, stage, *what):
        return [
            Span(kind, module, stage, scale * start, scale * end, microbatch, bridge)
            for kind, start, end, microbatch, bridge in what
        ]

    return {
        0: spans(
            *("vision", 0),
            *(("forward", 0, 1, 0, None), ("forward", 1, 2, 1, None)),
            ("send_forward", 2, 2.5, 0, "vision"),
            *(("backward", 4, 6, 0, None), ("backward", 6, 8, 1, None)),
            *(("reduce_gradients", 8, 8.5, None, None), ("optimizer", 9, 10, None, None)),
        ),
        1: spans(
            *("vision", 0),
            *(("forward", 0, 3, 0, None), ("forward", 3, 6, 1, None)),
            *(("backward", 6, 7, 0, None), ("backward", 7, 8, 1, None)),
            *(("data", 8, 8.4, 2, None), ("optimizer", 9, 10, None, None)),
        ),
        2: spans(
            *("language", 0),
            *(("recv_forward", 0, 2, 0, "vision"), ("forward", 2, 3, 0, None)),
            *(("forward", 3, 4, 1, None), ("send_forward", 4, 5, 1, None)),
            *(("backward", 5, 6, 0, None), ("backward", 6, 7, 1, None)),
            ("optimizer", 9, 9.5, None, None),
        ),
        3: spans(
            *("language", 1),
            *(("forward", 3, 3.5, 0, None), ("backward", 3.5, 4.5, 0, None)),
            *(("forward", 4.5, 5, 1, None), ("backward", 5, 6, 1, None)),
            ("optimizer", 9, 9.5, None, None),
        ),
    }


STEPS = [step(1), step(1), step(2)]


def test_the_summary_by_hand():
    summary = StepSummary.of(
        STEPS,
        GRIDS,
        samples=MICRO_BATCH_SIZE * NUM_MICROBATCHES,
        sequence_length=100,
        gpus_per_node=3,
        flops_per_sample=1e12,
    )
    assert summary.seconds == 10, "the median"
    for name, shares in {
        "vision": StageShares((7.5 + 9) / 20, 0.5 / 20, 1 - 17 / 20),
        "language": StageShares((4.5 + 3.5) / 20, 2 / 20, 1 - 10 / 20),
    }.items():
        found = summary.modules[name]
        assert (found.busy, found.waiting, found.idle) == pytest.approx(
            (shares.busy, shares.waiting, shares.idle)
        ), name
    assert summary.imbalance == {"vision": pytest.approx(8 / 7)}, "6 seconds and 8 of computing"
    assert summary.samples_per_second == 1.6
    assert summary.tokens_per_second == 160
    assert summary.flops_per_second == 1.6e12
    assert (summary.used_gpus, summary.allocated_gpus) == (4, 6)
    lines = [line.split() for line in str(summary).splitlines()]
    assert lines[0] == ["10", "s", "a", "step"]
    assert summary.data == {"vision": pytest.approx(0.4 / 20), "language": 0}
    assert ["vision", "82%", "2%", "2%", "13%", "1.14"] in lines
    assert ["language", "40%", "10%", "0%", "50%"] in lines
    assert [
        "1.6",
        "samples/s:",
        "0.4",
        "a",
        "GPU",
        "in",
        "use",
        "(4),",
        "0.2667",
        "a",
        "GPU",
        "allocated",
        "(6)",
    ] in lines and [
        "160",
        "tokens/s:",
        "40",
        "a",
        "GPU",
        "in",
        "use",
        "(4),",
        "26.67",
        "a",
        "GPU",
        "allocated",
        "(6)",
    ] in lines


def test_a_module_that_did_nothing_is_balanced():
    assert data_parallel_imbalance([{0: [], 1: []}], GRIDS["vision"]) == 1


@pytest.mark.parametrize(("sharded", "optimizer"), [([], 1.0), (["vision"], 2.0)])
def test_the_costs_by_hand(sharded, optimizer):
    def rank(dense, sent, experts=0.0):
        name, size = dense
        return RankBytes(
            dense_gradients={name: size},
            expert_gradients={name: experts},
            sent_forward=sent,
            shards_optimizer=sharded if name == "vision" else [],
        )

    ranks = [
        rank(("vision", 100), {"vision": 160}),
        rank(("vision", 100), {"vision": 320}),
        rank(("language", 300), {"language": 800}, experts=7),
        rank(("language", 200), {}, experts=3),
    ]
    costs = measured_costs(
        STEPS,
        ranks,
        GRIDS,
        micro_batch_size=MICRO_BATCH_SIZE,
        num_microbatches=NUM_MICROBATCHES,
        sequence_length=100,
    )
    assert costs["vision"] == ModuleCosts(
        forward_seconds_per_sample=(1 + 3) / 8,
        backward_seconds_per_sample=(2 + 1) / 8,
        output_bytes_per_sample=(160 + 320) / 16,
        gradient_bytes=100,
        optimizer_seconds=optimizer,  # of one replica, or the shards of both
        measured_samples=4,
        imbalance=8 / 7,
    )
    assert costs["language"] == ModuleCosts(
        forward_seconds_per_sample=(1 + 0.5) / 8,
        backward_seconds_per_sample=(1 + 1) / 8,
        activation_bytes_per_sample=800 / 16,
        gradient_bytes=300 + 200 + 7 + 3,
        optimizer_seconds=1.0,
        measured_seq_length=100,
        measured_samples=8,
    )
    read = {name: ModuleCosts(**table) for name, table in tomllib.loads(to_toml(costs)).items()}
    assert read["language"] == costs["language"]
    assert read["vision"].imbalance == pytest.approx(8 / 7, rel=1e-5)


def test_a_frozen_module_has_the_backward_that_it_would_have():
    """Only gradients of activations were seen: half of a backward."""
    bytes_of = {
        "dense_gradients": {"vision": 0.0},
        "expert_gradients": {"vision": 0.0},
        "sent_forward": {},
        "shards_optimizer": [],
    }
    costs = measured_costs(
        STEPS,
        [RankBytes(**bytes_of)] * 2,
        {"vision": GRIDS["vision"]},
        micro_batch_size=MICRO_BATCH_SIZE,
        num_microbatches=NUM_MICROBATCHES,
        sequence_length=100,
    )
    assert costs["vision"].frozen
    assert costs["vision"].backward_seconds_per_sample == 2 * 3 / 8
