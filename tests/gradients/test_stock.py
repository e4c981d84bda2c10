"""Stock Megatron modules with configs of their own train like one process."""

import os
from random import Random

import pytest
from attrs import evolve
from layouts import (
    LAYOUTS,
    LOSSES,
    MANY_BUCKETS,
    OVERLAP,
    SHARDED,
    SOME_RANKS_WITHOUT,
    VARYING,
    parallel,
)
from ranks import world
from stock import RECOMPUTE, StockCase, mixture

SEQUENCE_PARALLEL = {"sequence_parallel": True}


def verify(case: StockCase) -> None:
    try:
        assert sum(world(case.world_size).run("stock:check", case)) > 0
    except AssertionError as error:
        error.add_note(f"to run it again: verify({case!r})")
        raise


FAN_IN = {"vision": parallel(dp=2), "language": parallel()}
FAN_OUT = {"vision": parallel(), "language": parallel(dp=2)}
ALL_IN_ONE = {"vision": (((0, 0, 5, 0), (0, 0, 0, 0)), ((0, 0, 0, 1), (3, 0, 0, 0)))}
UNKIND = {"images": ALL_IN_ONE, "lengths": (0, 1, 6, 2)}
"""Samples without text, of one token, and cut off; all images in one sample."""

BALANCED = mixture(
    moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1.0, moe_z_loss_coeff=0.1
)
EXPERTS = {"expert_model_parallel_size": 2}
WITHOUT = {"vision": (((1, 1, 0, 0), (1,)), ((0,), (0, 0, 2, 0)))}
"""One replica of an encoder has no image, or the other, or both."""

CASES = {
    "experts, a replica without images": StockCase(
        modules={"vision": parallel(dp=2, **EXPERTS), "language": parallel()},
        configs={"vision": mixture()},
        images=WITHOUT,
        ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True},
        evaluate=True,
        steps=3,
    ),
    "recomputed experts with auxiliary losses, a replica without images": StockCase(
        modules={
            "vision": parallel(dp=2, rank_offset=0, **EXPERTS),
            "language": parallel(tp=2, rank_offset=0),
        },
        configs={
            "vision": mixture(
                moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
                moe_aux_loss_coeff=[1.0, 0.5],
                moe_z_loss_coeff=0.1,
                **RECOMPUTE,
            )
        },
        images={"vision": (((1, 1, 0, 0),),)},
        per_token={"vision": True, "language": True},
        steps=2,
    ),
    "mixtures of different depth on the same rank": StockCase(
        modules={name: parallel(rank_offset=0) for name in ("vision", "language")},
        configs={"vision": BALANCED | {"num_layers": 1}, "language": BALANCED},
        steps=2,
    ),
    "shared experts, a replica without images": StockCase(
        modules={"vision": parallel(dp=2, expert_tensor_parallel_size=2), "language": parallel()},
        configs={"vision": mixture()},
        images=WITHOUT,
        steps=2,
    ),
    "replicas that meet, one without images": StockCase(
        modules={"vision": parallel(dp=2), "language": parallel()},
        meets=True,
        images=WITHOUT,
        steps=2,
    ),
    "fan-in": StockCase(modules=FAN_IN, steps=2, per_token={"language": True}),
    "fan-out": StockCase(modules=FAN_OUT, steps=2, ddp={"use_distributed_optimizer": True}),
    "sequence-parallel language model": StockCase(
        modules={"vision": parallel(dp=2), "language": parallel(tp=2)},
        configs={"language": SEQUENCE_PARALLEL},
        steps=2,
    ),
    "recompute": StockCase(
        modules=FAN_IN, configs={"vision": RECOMPUTE, "language": RECOMPUTE}, steps=2
    ),
    "unkind data, fan-in": StockCase(modules=FAN_IN, steps=3, **UNKIND),
    "unkind data, fan-out": StockCase(modules=FAN_OUT, steps=3, **UNKIND),
    "NaN in an image": StockCase(modules=FAN_IN, steps=3, nan_step=1),
    "a layer's norms alone": StockCase(
        modules=FAN_OUT, steps=2, frozen=("vision.", "language."), trainable=("0.input_layernorm",)
    ),
    "sequence-parallel encoder": StockCase(
        modules={"vision": parallel(tp=2), "language": parallel()},
        configs={"vision": SEQUENCE_PARALLEL},
        steps=2,
    ),
    "mixture encoder": StockCase(
        modules={"vision": parallel(dp=2, expert_model_parallel_size=2), "language": parallel()},
        configs={"vision": mixture()},
        steps=2,
    ),
    "replicas beside shards": StockCase(modules=LAYOUTS["colocated"], steps=2),
    "shards beside replicas": StockCase(modules=LAYOUTS["colocated, fan-out"], steps=2),
    "recomputed from what is frozen": StockCase(
        modules={name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")},
        configs={"language": RECOMPUTE},
        frozen=("vision.", "language.embedding"),
        steps=2,
    ),
    "recomputed without images on one rank": StockCase(
        modules={name: parallel(dp=2, rank_offset=0) for name in ("vision", "language")},
        configs={"vision": RECOMPUTE, "language": RECOMPUTE},
        images=SOME_RANKS_WITHOUT,
        frozen=("vision.encoders.encoder.embed", "language.embedding"),
        steps=3,
    ),
    "frozen embeddings": StockCase(modules=FAN_IN, steps=2, frozen=("language.embedding",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whole_steps(case):
    verify(case)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_auxiliary_losses_of_an_encoder_weigh_the_same_beside_a_dense_language_model(
    loss, num_microbatches
):
    verify(
        StockCase(
            modules={"vision": parallel(), "language": parallel()},
            configs={"vision": BALANCED},
            per_token=loss,
            num_microbatches=num_microbatches,
            steps=2,
        )
    )


@pytest.mark.parametrize("layout", ["colocated", "colocated, fan-out"])
def test_modules_on_shared_ranks_drop_what_is_theirs(layout):
    # Vision draws masks for as many images as a rank has; tensor-parallel ranks of the language
    # model must drop the same all the same.
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    case = StockCase(
        modules=LAYOUTS[layout],
        configs={"vision": dropout, "language": dropout},
        images=VARYING,
        steps=3,
    )
    with_dropout, _ = world(2).run("stock:train_consistently", case)
    without, _ = world(2).run("stock:train_consistently", evolve(case, configs={}))
    assert with_dropout != without


JOBS = int(os.environ.get("MIMO_STOCK_JOBS", "3"))
"""How many jobs are drawn; the first ones are always the same."""

FROZEN = (
    ((), ()),
    ((), ()),
    (("vision.",), ()),
    (("language.embedding",), ()),
    (("vision.encoders.encoder.embed", "language.decoder.layers.0"), ()),
    (("vision.encoders", "language.embedding"), ("layernorm",)),
    (("vision.", "language."), ("input_layernorm", "final_layernorm")),
    (("language.",), ()),
)
SETTINGS = (
    {},
    OVERLAP,
    SHARDED,
    {**OVERLAP, **SHARDED, "overlap_param_gather": True},
    MANY_BUCKETS,
)


def drawn(number: int) -> StockCase:
    """A job of any layout that fits on four ranks, with any settings and any data."""
    draw = Random(number)
    size = draw.choice((2, 2, 4))
    shared = draw.random() < 0.4
    sizes = {}
    for name in ("vision", "language"):
        ranks = size if shared else max(1, size // 2)
        tp = draw.choice([n for n in (1, 2) if ranks % n == 0])
        pp = 1
        if name == "language" and not shared and ranks // tp > 1:
            pp = draw.choice((1, 2))
        sizes[name] = tp, pp, ranks // tp // pp
    configs, modules = {}, {}
    for name, (tp, pp, dp) in sizes.items():
        settings = dict(RECOMPUTE) if draw.random() < 0.3 else {}
        experts = {}
        if draw.random() < 0.4:
            settings |= mixture()
            ep = draw.choice([n for n in (1, 2) if tp * dp % n == 0])
            experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
        if tp > 1 and (experts or draw.random() < 0.5):
            settings |= SEQUENCE_PARALLEL
        configs[name] = settings
        modules[name] = parallel(tp, pp, dp, **experts, **({"rank_offset": 0} if shared else {}))
    frozen, trainable = draw.choice(FROZEN)
    return StockCase(
        modules=modules,
        configs=configs,
        images={
            "vision": tuple(
                tuple(tuple(draw.choice((0, 0, 1, 2, 5)) for _ in range(4)) for _ in range(2))
                for _ in range(2)
            )
        },
        lengths=draw.choice(((), (0, 1, 6, 2), (0, 0, 3, 6), (6, 2, 0, 0))),
        num_microbatches=draw.choice((1, 2, 3)),
        steps=draw.choice((2, 3)),
        per_token=draw.choice(list(LOSSES.values())),
        ddp=draw.choice(SETTINGS),
        frozen=frozen,
        trainable=trainable,
        nan_step=draw.choice((-1, -1, 1)),
        evaluate=draw.random() < 0.2,
        seed=number,
    )


@pytest.mark.parametrize("number", range(JOBS))
def test_drawn(number):
    verify(drawn(number))
