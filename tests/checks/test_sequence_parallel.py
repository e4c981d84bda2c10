"""What tensor and sequence parallelism want of weights, and what MimoModel cannot run.

A sentence on every rank says it when the coordinator is built, or with a step's norms.
"""

from typing import Any

from attrs import frozen
from layouts import parallel
from ranks import world
from stock import StockCase

LAYOUT = {"vision": parallel(), "language": parallel(tp=2)}
SCATTERED = "twice"
SEQUENCE_PARALLEL = {"language": {"sequence_parallel": True}}


def _errors(job: Any, *args: Any) -> list[str]:
    """What each of three ranks says."""
    answers, errors = world(3).try_run(job, *args)
    assert not answers
    assert {name for name, _ in errors.values()} == {"ValueError"}
    return [text for _, text in errors.values()]


def _build(case: StockCase, where: str) -> list[str]:
    """Build a model whose language model has a weight of the user's own; what is logged of it."""
    import logging

    import torch
    import vlm

    from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

    infra = MegatronMIMOInfra.build(case.modules)
    infra.initialize_megatron(1)
    model = case.bare(infra)
    for name, module in vlm.submodules(model).items():
        if name == "language" and where == SCATTERED:
            module.embedding.scatter_to_sequence_parallel = True
        elif name == "language" and where:
            module.get_submodule(where).adapter = torch.nn.Linear(2, 2, bias=False)
    case.wrap_modules(infra, model)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mimo_coord").addHandler(handler)
    try:
        MultiModuleCoordinator(infra, model)
    finally:
        logging.getLogger("megatron_mimo_coord").removeHandler(handler)
        infra.destroy()
    return said


def test_a_weight_inside_a_layer_that_says_nothing_of_the_sequence():
    case = StockCase(modules=LAYOUT, configs=SEQUENCE_PARALLEL)
    for text in _errors("test_sequence_parallel:_build", case, "decoder.layers.1.mlp"):
        assert "replicated weights decoder.layers.1.mlp.adapter.weight do not say" in text
        assert "set parameter.sequence_parallel = True" in text
    world(3).run("test_sequence_parallel:_build", StockCase(modules=LAYOUT), "decoder.layers.1.mlp")


def test_a_weight_outside_of_all_layers_is_taken_to_see_the_whole():
    case = StockCase(modules=LAYOUT, configs=SEQUENCE_PARALLEL)
    _, first, other = world(3).run("test_sequence_parallel:_build", case, "decoder")
    assert "embedding.position_embeddings.weight, decoder.adapter.weight are taken to" in first[0]
    assert len(first) == 1 and not other, "once a module"


def test_what_mimo_model_cannot_run():
    predicting = {"language": {"mtp_num_layers": 1}}
    for configs, where, said in (
        (predicting, "", "mtp_num_layers=1"),
        (SEQUENCE_PARALLEL, SCATTERED, "pass it scatter_embedding_sequence_parallel=False"),
    ):
        case = StockCase(modules=LAYOUT, configs=configs)
        for text in _errors("test_sequence_parallel:_build", case, where):
            assert said in text


@frozen(kw_only=True)
class Adapted(StockCase):
    """With adapters of a low rank, zero at first, of which each rank has a shard of the second."""

    def wrap_modules(self, infra: Any, model: Any) -> None:
        import torch

        for layer in model.language_model.decoder.layers if model.language_model else ():
            linear = layer.mlp.linear_fc1
            linear.first = torch.nn.Linear(linear.weight.shape[1], 2, bias=False).cuda()
            linear.second = torch.nn.Linear(2, linear.weight.shape[0], bias=False).cuda()
            torch.nn.init.zeros_(linear.second.weight)
            for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                setattr(linear.second.weight, name, getattr(linear.weight, name))
            linear.register_forward_hook(_add_adapter)
        super().wrap_modules(infra, model)


def _add_adapter(linear: Any, given: Any, made: Any) -> Any:
    output, bias = made
    return output + linear.second(linear.first(given[0])), bias


def test_copies_that_get_parts_of_a_gradient():
    case = Adapted(modules=LAYOUT, steps=3)
    answers, errors = world(3).try_run("test_sequence_parallel:_train", case)
    assert not answers
    for name, text in errors.values():
        assert name == "RuntimeError"
        assert (
            "ranks of language have other gradients of the same weights (decoder.layers.0." in text
        )
        assert "mlp.linear_fc1.first.weight, decoder.layers.1.mlp.linear_fc1.first.weight)" in text


@frozen(kw_only=True)
class Noisy(StockCase):
    """With a bias and a weight beside it, whose gradients are other ones on each rank."""

    noisy: str = ""

    def wrap_modules(self, infra: Any, model: Any) -> None:
        import torch
        import torch.distributed as dist

        if model.language_model:
            linear = torch.nn.Linear(2, 2).cuda()
            model.language_model.decoder.beside = linear

            def add_nothing(_: Any, __: Any, made: Any) -> Any:
                noise = (getattr(linear, self.noisy) * dist.get_rank()).sum()
                return made + noise - noise.detach()

            model.language_model.register_forward_hook(add_nothing)
        super().wrap_modules(infra, model)


def test_rounding_errors_of_biases_may_differ():
    for noisy, said in ("weight", "decoder.beside.weight)"), ("bias", ""):
        case = Noisy(modules=LAYOUT, noisy=noisy)
        _, errors = world(3).try_run("test_sequence_parallel:_train", case)
        assert len(errors) == (3 if said else 0)
        assert all(said in text for _, text in errors.values())


def _train(case: StockCase) -> None:
    import cases

    list(cases.train(case))


def test_a_text_that_tensor_parallel_ranks_cannot_share():
    shared = parallel(tp=2, rank_offset=0)
    case = StockCase(
        modules={"vision": shared, "language": shared},
        configs=SEQUENCE_PARALLEL,
        multiple=9,
        max_sequence=12,
    )
    answers, errors = world(2).try_run("test_sequence_parallel:_train", case)
    assert not answers
    for name, text in errors.values():
        assert name == "RuntimeError"
        assert "texts are 9 tokens long, which 2 (TP 2 of sequence parallelism) does not" in text
