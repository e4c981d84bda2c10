"""Stock Megatron modules with configs of their own train like one process."""

import pytest
from attrs import evolve
from layouts import LAYOUTS, LOSSES, OVERLAP, SHARDED, SOME_RANKS_WITHOUT, VARYING, parallel
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
    balanced = mixture(
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1.0, moe_z_loss_coeff=0.1
    )
    verify(
        StockCase(
            modules={"vision": parallel(), "language": parallel()},
            configs={"vision": balanced},
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
