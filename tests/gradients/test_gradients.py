"""Every module's gradient is that of the one loss: real ranks against one process."""

import os

import pytest
from attrs import evolve
from cases import MUTANTS, Case
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from layouts import (
    FAN_IN,
    FAN_OUT,
    FIRST_WITHOUT,
    LAST_WITHOUT,
    LAYOUTS,
    LOSSES,
    MANY_BUCKETS,
    MIXTURE,
    OVERLAP,
    PER_TOKEN,
    SHARDED,
    SOME_RANKS_WITHOUT,
    VARYING,
    parallel,
)
from ranks import world


def verify(case: Case) -> None:
    try:
        assert sum(world(case.world_size).run("cases:check", case)) > 0
    except AssertionError as error:
        error.add_note(f"to run it again: verify({case!r})")
        raise


@pytest.mark.parametrize(
    ("layout", "loss"),
    [
        pytest.param(LAYOUTS[layout], LOSSES[loss], id=f"{layout}-{loss}")
        for layout in LAYOUTS
        for loss in LOSSES
        if layout in ("fan-in", "fan-out", "colocated") or loss not in ("mean", "per token")
    ],
)
def test_layouts_and_losses(layout, loss):
    rehearse = loss in (LOSSES["mean"], LOSSES["language per token"])  # the others launch the same
    verify(Case(modules=layout, per_token=loss, steps=1, rehearse=rehearse))


def test_encoders_on_the_same_ranks():
    layout = {
        "vision": parallel(dp=2, rank_offset=0),
        "audio": parallel(dp=2, rank_offset=0),
        "language": parallel(rank_offset=2),
    }
    verify(Case(modules=layout, steps=2, num_microbatches=3))


@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN, images=VARYING, steps=2),
        Case(modules=FAN_OUT, images=VARYING, steps=2, per_token=PER_TOKEN),
        Case(modules=LAYOUTS["equal"], images=VARYING, steps=2),
        Case(modules=LAYOUTS["encoder pipeline"], images=VARYING, steps=2, num_microbatches=4),
        Case(
            modules={"vision": parallel(pp=2), "language": parallel(dp=2)},
            images=VARYING,
            num_microbatches=3,
        ),
        Case(
            modules=LAYOUTS["two encoders"],
            images={**VARYING, "audio": (((1, 0, 0, 2), (0, 0, 0, 0)),)},
            steps=2,
        ),
        Case(
            modules={"vision": parallel(dp=4), "language": parallel(pp=2, dp=2)},
            images={"vision": (((0, 3, 0, 0), (2, 1, 1, 0)),)},
            num_microbatches=5,
        ),
        Case(modules=LAYOUTS["colocated"], images=VARYING, steps=2),
        Case(modules=LAYOUTS["colocated, fan-out"], images=VARYING, steps=2),
        Case(modules=LAYOUTS["colocated"], images=SOME_RANKS_WITHOUT, steps=4, ddp=OVERLAP),
        Case(modules=LAYOUTS["colocated, fan-out"], images=LAST_WITHOUT, steps=3, ddp=OVERLAP),
    ],
)
def test_images_per_sample_vary(case):
    verify(case)


@pytest.mark.parametrize(
    ("first", "then", "overlap", "loss", "sharded"),
    [
        (LAST_WITHOUT, FIRST_WITHOUT, OVERLAP, {}, {}),
        (FIRST_WITHOUT, LAST_WITHOUT, OVERLAP, PER_TOKEN, SHARDED),
        (LAST_WITHOUT, FIRST_WITHOUT, MANY_BUCKETS, {}, SHARDED),
        (FIRST_WITHOUT, LAST_WITHOUT, MANY_BUCKETS, PER_TOKEN, {}),
    ],
    ids=["mean", "per token, sharded", "many buckets, sharded", "many buckets, per token"],
)
def test_microbatches_without_images_under_overlap(first, then, overlap, loss, sharded):
    """From the first step on, in which Megatron counts a bucket's gradients, or later."""
    images = {"vision": (*first["vision"], *then["vision"], *SOME_RANKS_WITHOUT["vision"])}
    layout = {"vision": parallel(dp=2), "language": parallel(dp=2)}
    ddp = {**overlap, **sharded}
    rehearse = bool(sharded)
    case = Case(modules=layout, images=images, steps=10, per_token=loss, ddp=ddp, rehearse=rehearse)
    verify(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(
            modules={
                "vision": parallel(dp=2),
                "language": parallel(dp=2, expert_model_parallel_size=2),
            },
            **MIXTURE,
            per_token=PER_TOKEN,
            ddp={**OVERLAP, **SHARDED},
            steps=2,
        ),
        Case(
            modules={
                "vision": parallel(dp=2),
                "language": parallel(dp=2, expert_model_parallel_size=2),
            },
            **MIXTURE,
            ddp={"average_in_collective": True},
            steps=2,
        ),
        Case(
            modules={
                "vision": parallel(dp=4, rank_offset=0),
                "language": parallel(tp=2, dp=2, expert_model_parallel_size=2, rank_offset=0),
            },
            images=VARYING,
            **MIXTURE,
            ddp=SHARDED,
        ),
        Case(
            modules={
                "vision": parallel(tp=2, dp=2, rank_offset=0),
                "language": parallel(
                    tp=2,
                    pp=2,
                    expert_model_parallel_size=2,
                    expert_tensor_parallel_size=1,
                    rank_offset=0,
                ),
            },
            images=VARYING,
            **MIXTURE,
            assign=1,
            per_token=PER_TOKEN,
        ),
        Case(
            modules={
                "vision": parallel(),
                "language": parallel(
                    tp=2, dp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
                ),
            },
            **MIXTURE,
        ),
    ],
)
def test_mixtures_of_experts(case):
    verify(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(modules=FAN_IN, frozen=("vision.",), steps=2),
        Case(modules=FAN_IN, frozen=("vision.encoders",), steps=2, rehearse=False),
        Case(modules=FAN_IN, frozen=("language.",), steps=2, per_token=PER_TOKEN),
        Case(modules=FAN_IN, frozen=("language.",), steps=2, ddp={**OVERLAP, **SHARDED}),
        Case(modules=LAYOUTS["fan-in, pipeline"], tied_embeddings=True, steps=2),
        Case(
            modules=LAYOUTS["fan-in, pipeline"], tied_embeddings=True, steps=2, per_token=PER_TOKEN
        ),
        Case(
            modules={"vision": parallel(), "language": parallel(pp=2, dp=2)},
            tied_embeddings=True,
            steps=3,
            per_token=PER_TOKEN,
            ddp=SHARDED,
        ),
        Case(modules=FAN_OUT, ddp={"average_in_collective": True}, steps=2),
        Case(
            modules=FAN_IN,
            ddp={"average_in_collective": True},
            per_token={"vision": True},
            steps=2,
            rehearse=False,
        ),
        Case(
            modules=FAN_IN,
            ddp={"average_in_collective": True},
            per_token={"language": True},
            steps=2,
            rehearse=False,
        ),
        Case(modules=FAN_IN, ddp=SHARDED, force_all_reduce=True, steps=3, per_token=PER_TOKEN),
        Case(
            modules=FAN_IN,
            ddp={**SHARDED, **OVERLAP},
            force_all_reduce=True,
            steps=3,
            per_token=PER_TOKEN,
        ),
        Case(
            modules=FAN_IN,
            ddp={**SHARDED, **OVERLAP, "overlap_param_gather": True, "align_param_gather": True},
            steps=3,
        ),
        Case(modules=FAN_IN, num_microbatches=9, steps=2, per_token=PER_TOKEN, rehearse=False),
        Case(modules=FAN_IN, zeroed_by_ddp=True, steps=3, per_token=PER_TOKEN),
        Case(modules=LAYOUTS["colocated"], zeroed_by_ddp=True, steps=3, ddp=OVERLAP),
        Case(modules=FAN_IN, second_coordinator=True, steps=3),
        Case(
            modules=FAN_OUT, second_coordinator=True, steps=3, ddp=MANY_BUCKETS, per_token=PER_TOKEN
        ),
        Case(modules=FAN_IN, unmasked=0.0, steps=2, rehearse=False),
        Case(modules=FAN_IN, unmasked=0.0, steps=2, per_token=PER_TOKEN, rehearse=False),
        Case(
            modules=FAN_IN,
            images=SOME_RANKS_WITHOUT,
            num_microbatches=1,
            steps=4,
            ddp={**SHARDED, **OVERLAP, "overlap_param_gather": True},
        ),
        Case(
            modules=LAYOUTS["colocated"],
            images=SOME_RANKS_WITHOUT,
            steps=4,
            ddp={**SHARDED, **MANY_BUCKETS, "overlap_param_gather": True},
            evaluate=True,
        ),
        Case(modules=FAN_IN, second_coordinator=True, steps=3, ddp={**SHARDED, **OVERLAP}),
    ],
)
def test_settings(case):
    verify(case)


@pytest.mark.parametrize("where", ["model", "submodules"])
@pytest.mark.parametrize(
    "layout",
    [FAN_IN, FAN_OUT, {name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")}],
    ids=["fan-in", "fan-out", "shared ranks"],
)
def test_bf16_with_fp32_reduction(layout, where):
    case = Case(modules=layout, wrap=where, ddp={"grad_reduce_in_fp32": True})
    assert sum(world(case.world_size).run("cases:check", case, 0.05)) > 0


def test_ranks_with_and_without_images_send_the_same_dtype():
    # Float16Module makes fp32 of the output of the rank that has images.
    case = Case(
        modules=LAYOUTS["colocated"], wrap="submodules", images={"vision": (((1, 1, 0, 0),),)}
    )
    assert sum(world(case.world_size).run("cases:check", case, 0.05)) > 0


# -- encoders on ranks of a pipelined language model -----------------------------------------------

FOUR = {"vision": parallel(dp=4, rank_offset=0)}
STAGES = {"language": parallel(pp=2, dp=2, rank_offset=0)}


@pytest.mark.parametrize(
    "case",
    [
        Case(
            modules={**FOUR, "audio": parallel(tp=2, rank_offset=2), **STAGES},
            images={**VARYING, "audio": (((1, 0, 0, 2), (0, 0, 0, 0)),)},
            num_microbatches=3,
            steps=2,
            ddp=MANY_BUCKETS,
            per_token={"language": True},
            encoder_microbatches=1,
        ),
        Case(
            modules={**FOUR, **STAGES},
            images=SOME_RANKS_WITHOUT,
            steps=4,
            ddp={**SHARDED, **OVERLAP, "overlap_param_gather": True},
            assign=1,
            assign_ahead=True,
            evaluate=True,
            tied_embeddings=True,
        ),
        Case(
            modules={
                "vision": parallel(rank_offset=2),
                "language": parallel(pp=2, dp=2, rank_offset=0, expert_model_parallel_size=2),
            },
            images=VARYING,
            **MIXTURE,
            frozen=("vision.encoders",),
            encoder_microbatches=0,
            steps=2,
        ),
        Case(modules=LAYOUTS["colocated"], images=VARYING, encoders_first=True, steps=2, assign=2),
    ],
)
def test_encoders_before_and_after_the_language_model(case):
    verify(case)


# -- drawn layouts ---------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Whole jobs on up to four ranks: layout, data, losses, DDP, optimizer."""
    kind = draw(st.sampled_from(["disjoint", "colocated", "encoders first"]))
    colocated, encoders_first = kind == "colocated", kind == "encoders first"
    powers = st.sampled_from([1, 2])
    language = parallel(tp=draw(powers), pp=1 if colocated else draw(powers), dp=draw(powers))
    if not colocated:
        language = evolve(language, context_parallel_size=draw(powers))
    packed = language.context_parallel_size == 1 and draw(st.booleans())
    experts = draw(st.sampled_from([None, None, 4]))
    if experts is not None:
        packed = packed and language.tensor_model_parallel_size == 1  # which would share the row
        expert_tp = draw(st.sampled_from(sorted({1, language.tensor_model_parallel_size})))
        stage = language.size // language.pipeline_model_parallel_size // expert_tp
        language = evolve(
            language,
            expert_tensor_parallel_size=expert_tp,
            expert_model_parallel_size=draw(st.sampled_from([n for n in (1, 2, 4) if n <= stage])),
        )
    names = draw(st.sampled_from([["vision"], ["vision", "audio"]]))
    modules = {}
    for name in names:
        if colocated:
            tp = draw(st.sampled_from([size for size in (1, 2) if language.size % size == 0]))
            modules[name] = parallel(tp=tp, dp=language.size // tp, rank_offset=0)
        elif encoders_first:
            tp, dp = draw(powers), draw(st.sampled_from([1, 2, 4]))
            assume(tp * dp <= language.size)
            offset = draw(st.integers(0, language.size - tp * dp))
            modules[name] = parallel(tp=tp, dp=dp, rank_offset=offset)
        else:
            modules[name] = parallel(tp=draw(powers), pp=draw(powers), dp=draw(powers))
    offset = 0 if colocated or encoders_first else None
    modules["language"] = evolve(language, rank_offset=offset)
    steps, num_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    numbers = st.integers(0, 2)
    sample = st.lists(numbers, min_size=4, max_size=4).map(tuple)
    step = st.lists(sample, min_size=num_microbatches, max_size=num_microbatches).map(tuple)
    images = {name: tuple(draw(st.lists(step, min_size=1, max_size=3))) for name in names}
    overlap = draw(st.booleans())
    gather = overlap and draw(st.booleans())
    per_token = {name: draw(st.booleans()) for name in modules}
    return Case(
        modules=modules,
        images=images,
        num_microbatches=num_microbatches,
        steps=steps,
        per_token=per_token,
        unmasked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        ddp={
            "overlap_grad_reduce": overlap,
            "use_distributed_optimizer": gather or draw(st.booleans()),
            "average_in_collective": draw(st.booleans()),
            "overlap_param_gather": gather,
            **({"bucket_size": draw(st.sampled_from([1, 500, 10**6]))} if overlap else {}),
        },
        frozen=draw(st.sampled_from([(), (), ("vision.",), ("vision.encoders",), ("language.",)])),
        force_all_reduce=draw(st.booleans()),
        zeroed_by_ddp=draw(st.booleans()),
        second_coordinator=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        assign=draw(st.integers(0, 2)),
        packed=packed,
        lengths=(6, 2, 1, 4) if packed else (),
        experts=experts,
        encoders_first=encoders_first or (colocated and draw(st.booleans())),
        encoder_microbatches=draw(st.sampled_from([None, 0, 1])),
        seed=draw(st.integers(0, 99)),
    )


@settings(
    max_examples=int(os.environ.get("MIMO_LAYOUTS", "8")),
    deadline=None,
    derandomize=True,
    print_blob=False,
)
@given(cases().filter(lambda case: case.world_size <= int(os.environ.get("MIMO_RANKS", "4"))))
def test_drawn_layouts(case):
    note(f"verify({case!r})")
    verify(case)


# -- the suite notices what breaks -----------------------------------------------------------------

SENSITIVE = [  # each mutant shows in one of them
    Case(modules=modules, per_token=per_token, no_optimizer=True)
    for modules, per_token in (
        ({"vision": parallel(dp=2), "language": parallel(tp=2)}, {"language": True}),
        (FAN_OUT, {}),
        ({"vision": parallel(dp=2), "language": parallel(tp=2)}, PER_TOKEN),
    )
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    caught = any(
        any(world(case.world_size).run("cases:is_caught", case, mutant)) for case in SENSITIVE
    )
    assert caught == (mutant != "none")
