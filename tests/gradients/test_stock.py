"""Stock Megatron modules with configs of their own train like one process."""

import os

import cases
import pytest
from attrs import evolve
from layouts import (
    LAYOUTS,
    LOSSES,
    OVERLAP,
    SHARDED,
    SOME_RANKS_WITHOUT,
    VARYING,
    parallel,
)
from ranks import world
from stock import RECOMPUTE, SEQUENCE_PARALLEL, StockCase, mixture
from stock_draws import drawn, drawn_with_dropout


def verify(case: StockCase, *then: object) -> None:
    try:
        assert sum(world(case.world_size).run("stock:check", case, *then)) > 0
    except AssertionError as error:
        error.add_note(f"to run it again: verify({', '.join(map(repr, (case, *then)))})")
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


class BareOfInputs(StockCase):
    """Whose encoders are given ``{}`` where there is no image."""

    def encoder_inputs(self, images):
        return super().encoder_inputs(images) or {}


CASES = {
    **{
        f"empty inputs, {where} ranks": BareOfInputs(modules=modules, images=WITHOUT, steps=2)
        for where, modules in (
            ("own", FAN_IN),
            (
                "shared",
                {
                    "vision": parallel(dp=2, rank_offset=0),
                    "language": parallel(pp=2, rank_offset=0),
                },
            ),
        )
    },
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
        configs={"vision": BALANCED, "language": BALANCED | {"num_layers": 2}},
        steps=2,
    ),
    **{
        f"an encoder's auxiliary losses beside context parallelism, {where} ranks": StockCase(
            modules={"vision": vision, "language": language},
            configs={"vision": {**BALANCED, "sequence_parallel": where == "shared"}},
            steps=2,
        )
        for where, vision, language in (
            ("own", parallel(), parallel(context_parallel_size=2)),
            (
                "shared",
                parallel(tp=2, rank_offset=0),
                parallel(context_parallel_size=2, rank_offset=0),
            ),
        )
    },
    "shared experts, a replica without images": StockCase(
        modules={"vision": parallel(dp=2, expert_tensor_parallel_size=2), "language": parallel()},
        configs={"vision": mixture()},
        images=WITHOUT,
        steps=2,
    ),
    **{
        f"replicas that meet over a {meets}, one without images": StockCase(
            modules=FAN_IN, meets=meets, images=WITHOUT, steps=2
        )
        for meets in ("group", "collection")
    },
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
    "unkind data, fan-in": StockCase(modules=FAN_IN, steps=2, **UNKIND),
    "unkind data, fan-out": StockCase(modules=FAN_OUT, steps=2, **UNKIND),
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
    "all in bf16": StockCase(
        modules=FAN_IN,
        wrap="model",
        ddp={**SHARDED, **OVERLAP, "grad_reduce_in_fp32": True},
        steps=3,
    ),
    "frozen embeddings": StockCase(modules=FAN_IN, steps=2, frozen=("language.embedding",)),
}


LAUNCH_THE_SAME = {
    *("recompute", "recomputed from what is frozen", "unkind data, fan-in", "unkind data, fan-out"),
    *("NaN in an image", "a layer's norms alone", "frozen embeddings", "shards beside replicas"),
    *("mixtures of different depth on the same rank", "mixture encoder"),
}
"""As others do, or as cases of test_gradients."""


@pytest.mark.parametrize("name", CASES)
def test_whole_steps(name):
    verify(evolve(CASES[name], rehearse=name not in LAUNCH_THE_SAME))


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
            loss_scale=1024.0 if num_microbatches > 1 else 1.0,
            steps=2,
            rehearse=num_microbatches > 1 and loss == LOSSES["per token"],
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


class WithSizes(StockCase):
    """Whose encoder is given what is no tensor."""

    def encoder_inputs(self, images):
        return {"encoder": {"images": images, "sizes": range(2)}} if len(images) else None


def _refused(case: StockCase) -> str:
    with pytest.raises(RuntimeError) as error:
        list(cases.train(case))
    return str(error.value)


def test_an_empty_batch_of_what_nobody_knows():
    images = {"vision": (((1, 1, 0, 0), (0, 0, 1, 0)),)}
    for said in world(3).run(
        "test_stock:_refused", WithSizes(modules=FAN_IN, meets="group", images=images)
    ):
        assert "the replicas of vision meet in its forward, and one has no inputs" in said
        assert "holds a range, of which it cannot be told what an empty one is" in said


JOBS = int(os.environ.get("MIMO_STOCK_JOBS", "3"))
"""How many jobs are drawn; the first ones are always the same."""


@pytest.mark.parametrize("number", range(JOBS))
def test_drawn(number, tmp_path):
    verify(*drawn(number), str(tmp_path))


@pytest.mark.parametrize("number", range(JOBS))
def test_drawn_with_dropout(number, tmp_path):
    case, other = drawn_with_dropout(number)
    world(case.world_size).run("stock:check_equal", case, other, str(tmp_path))
