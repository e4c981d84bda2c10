"""Jobs of the stock model, drawn by number: any layout of up to four ranks, settings and data."""

from collections.abc import Sequence
from random import Random
from typing import Any

from attrs import evolve
from layouts import LOSSES, MANY_BUCKETS, OVERLAP, SHARDED, parallel
from stock import RECOMPUTE, SEQUENCE_PARALLEL, StockCase, mixture

from megatron_mimo_coord import ModuleParallelism

LANGUAGE = "language"
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
DDP = (
    {},
    OVERLAP,
    SHARDED,
    {**OVERLAP, **SHARDED, "overlap_param_gather": True},
    MANY_BUCKETS,
)
LENGTHS = ((), (0, 1, 6, 2), (0, 0, 3, 6), (6, 2, 0, 0), (1,))
MOST_IMAGES = (0, 0, 1, 2, 5)


def drawn(number: int) -> tuple[StockCase, StockCase]:
    """A job, and how it goes on, on another layout."""
    draw = Random(number)
    size = draw.choice((2, 4, 4))
    encoders = draw.choice((["vision"], ["vision"], ["vision", "audio"]))
    mixtures = [name for name in (*encoders, LANGUAGE) if draw.random() < 0.4]
    frozen, trainable = draw.choice(FROZEN)
    case = StockCase(
        modules={},
        images={name: _images(draw) for name in encoders},
        lengths=draw.choice(LENGTHS),
        multiple=8,
        num_microbatches=draw.choice((1, 2, 3)),
        per_token=draw.choice(list(LOSSES.values())),
        frozen=frozen,
        trainable=trainable,
        tied_embeddings=draw.random() < 0.2,
        nan_step=draw.choice((-1, -1, 0, 1)),
        layers=2,
        steps=2,
        seed=number,
    )
    first, then = (_placed(draw, case, size, encoders, mixtures) for _ in range(2))
    return first, evolve(then, steps=3)


def drawn_with_dropout(number: int) -> tuple[StockCase, StockCase]:
    """A job whose modules drop activations, and the same with settings that change nothing."""
    case, _ = drawn(number)
    draw = Random(-1 - number)
    dropping, plain = {}, {}
    for name in case.modules:
        rate = draw.choice((0.0, 0.2, 0.2))
        rates = {"hidden_dropout": rate, "attention_dropout": rate}
        dropping[name] = {**case.configs[name], **rates, **draw.choice(({}, RECOMPUTE))}
        plain[name] = {key: dropping[name][key] for key in dropping[name].keys() - RECOMPUTE.keys()}
    dropping[LANGUAGE] |= {"hidden_dropout": 0.2}
    plain[LANGUAGE] |= {"hidden_dropout": 0.2}
    return (
        evolve(case, configs=dropping, encoder_microbatches=0),
        evolve(case, configs=plain, encoder_microbatches=None, ddp={}),
    )


def _images(draw: Random) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Images of each sample, in two microbatches of each of two steps."""
    steps = []
    for _ in range(2):
        microbatches = []
        for _ in range(2):
            samples = [draw.choice(MOST_IMAGES) for _ in range(4)]
            if draw.random() < 0.2:  # all in one sample
                chosen = draw.randrange(4)
                samples = [5 if sample == chosen else 0 for sample in range(4)]
            microbatches.append(tuple(samples))
        steps.append(tuple(microbatches))
    return tuple(steps)


def _placed(
    draw: Random, case: StockCase, size: int, encoders: Sequence[str], mixtures: Sequence[str]
) -> StockCase:
    """The job on a layout of so many ranks, with settings of that layout."""
    ranks, offsets = _ranks(draw, size, encoders)
    modules, configs = {}, {}
    for name, number in ranks.items():
        modules[name], configs[name] = _module(draw, name, number, offsets, name in mixtures)
    return evolve(
        case,
        modules=modules,
        configs=configs,
        ddp=draw.choice(DDP),
        evaluate=draw.random() < 0.2,
        assign=draw.choice((0, 0, 1, 2)),
        encoders_first=offsets == dict.fromkeys(ranks, 0) and draw.random() < 0.5,
        encoder_microbatches=draw.choice((None, 0, 1)),
    )


def _ranks(draw: Random, size: int, encoders: Sequence[str]) -> tuple[dict[str, int], Any]:
    """How many ranks each module has, and where they begin if not one after another."""
    kind = draw.choice(("own", "own", "shared", "some"))
    half = size // 2
    if kind == "shared":
        ranks = dict.fromkeys((*encoders, LANGUAGE), size)
        return ranks, dict.fromkeys(ranks, 0)
    if kind == "some":
        ranks = {**dict.fromkeys(encoders, half), LANGUAGE: size}
        return ranks, {**{name: draw.choice((0, half)) for name in encoders}, LANGUAGE: 0}
    if len(encoders) == 1 or (size == 4 and draw.random() < 0.5):
        return {**dict.fromkeys(encoders, half // len(encoders)), LANGUAGE: half}, {}
    return {**dict.fromkeys(encoders, half), LANGUAGE: half}, {
        **dict.fromkeys(encoders, 0),
        LANGUAGE: half,
    }


def _module(
    draw: Random, name: str, ranks: int, offsets: dict[str, int], is_mixture: bool
) -> tuple[ModuleParallelism, dict[str, Any]]:
    """Sizes of a module on so many ranks, and its settings."""
    sizes = {"tp": 1, "cp": 1, "pp": 1, "dp": 1}
    for _ in range(ranks.bit_length() - 1):
        dims = [dim for dim in sizes if sizes[dim] == 1 or dim == "dp"]
        if name != LANGUAGE:
            dims = [dim for dim in dims if dim in ("tp", "dp")]
        sizes[draw.choice(dims)] *= 2
    tp, cp, pp, dp = sizes.values()
    more = {"context_parallel_size": cp}
    settings = dict(draw.choice(({}, {}, RECOMPUTE)))
    if is_mixture:
        settings |= mixture()
        ep, etp = draw.choice(
            [(e, t) for e in (1, 2, 4) for t in (1, 2) if tp * cp * dp % (e * t) == 0]
        )
        more |= {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    if tp > 1 and (is_mixture or draw.random() < 0.5):
        settings |= SEQUENCE_PARALLEL
    if offsets:
        more["rank_offset"] = offsets[name]
    return parallel(tp, pp, dp, **more), settings
