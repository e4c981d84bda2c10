"""What finalizing costs beyond DDP's own reductions: counted on real ranks, never timed."""

from typing import Any

import pytest
from cases import Case, built
from counting import Counter
from layouts import FAN_IN, FAN_OUT, MANY_BUCKETS, OVERLAP, PER_TOKEN, SHARDED, parallel
from ranks import world


def _count(case: Case) -> dict[str, Any]:
    """Counts of the coordinator's finalize and of Megatron's own, each on its own model."""
    import torch
    import weights
    from megatron.core.distributed import finalize_model_grads

    infra, model, coordinator = built(case)
    bare = weights.build_model(case.shape(), infra)
    tokens = (
        torch.ones((), dtype=torch.int, device="cuda") if case.per_token.get("language") else None
    )
    answer = {}
    for _ in range(3):
        coordinator.zero_grad_buffer()
        with Counter() as ours:
            coordinator.finalize_model_grads([model], tokens)
        with Counter() as theirs:
            for ddp, groups in _ddps(bare, infra):
                ddp.zero_grad_buffer()
                if case.ddp.get("overlap_grad_reduce"):
                    ddp.start_grad_sync()
                finalize_model_grads([ddp], None, pg_collection=groups)
        answer = {
            "syncs": ours.syncs,
            "more": _without(ours.collectives, theirs.collectives),
            "first": ours.collectives[0],
            "scaled": ours.scaled_bytes,
            "scaled by DDP": theirs.scaled_bytes,
            "buffer": sum(
                buffer.grad_data.numel() * buffer.grad_data.element_size()
                for ddp, _ in coordinator.module_to_grid_tuples
                for buffer in ddp.buffers
            ),
        }
    infra.destroy()
    return answer


def _ddps(model: Any, infra: Any) -> list[tuple[Any, Any]]:
    import vlm

    return [(ddp, infra.pg_collections[name]) for name, ddp in vlm.submodules(model).items()]


def _without(many: list[Any], few: list[Any]) -> list[Any]:
    rest = list(many)
    for item in few:
        rest.remove(item)
    return rest


DDPS = {
    "plain": {},
    "overlap": OVERLAP,
    "many buckets": MANY_BUCKETS,
    "sharded": SHARDED,
    "overlap, sharded": {**OVERLAP, **SHARDED},
}


@pytest.mark.parametrize("ddp", DDPS.values(), ids=DDPS)
@pytest.mark.parametrize("layout", [FAN_IN, FAN_OUT], ids=["fan-in", "fan-out"])
def test_a_mean_loss_costs_nothing_more(layout, ddp):
    for answer in world(3).run("test_finalize:_count", Case(modules=layout, ddp=ddp)):
        assert answer["syncs"] == []
        assert answer["more"] == []
        assert answer["scaled"] <= answer["buffer"], "DDP's own pass, or none"


def test_fan_in_from_two_to_one_scales_nothing_at_all():
    for answer in world(3).run("test_finalize:_count", Case(modules=FAN_IN)):
        assert answer["scaled"] == 0


@pytest.mark.parametrize("ddp", DDPS.values(), ids=DDPS)
@pytest.mark.parametrize("dp", [2, 4])
def test_a_per_token_loss_costs_one_number_and_a_pass_over_the_shard(dp, ddp):
    case = Case(
        modules={"vision": parallel(dp=dp), "language": parallel()}, per_token=PER_TOKEN, ddp=ddp
    )
    answers = world(dp + 1).run("test_finalize:_count", case)
    for rank, answer in enumerate(answers):
        assert answer["syncs"] == []
        [(name, numel)] = answer["more"]
        assert "allreduce" in name
        assert numel == 1
        if "overlap_grad_reduce" not in ddp:
            assert answer["first"] == (name, 1), "launched before the gradient reductions"
        share = dp if rank < dp and "use_distributed_optimizer" in ddp else 1
        assert answer["scaled"] <= answer["buffer"] // share + 16


# -- no rank waits for another module's reduction --------------------------------------------------


def _finish_in_turn(per_token: bool) -> bool:
    """The language model's reduction waits until the encoder's ranks have finalized."""
    import torch
    import torch.distributed as dist

    case = Case(modules=FAN_IN, per_token=PER_TOKEN if per_token else {})
    infra, model, coordinator = built(case)
    store = dist.distributed_c10d._get_default_store()
    key = f"finalized {per_token}"
    if dist.get_rank() == 2:
        ddp = model.language_model
        finish = ddp.finish_grad_sync

        def finish_last(**options: Any) -> None:
            store.wait([f"{key} 0", f"{key} 1"])  # raises if the encoder's ranks wait for us
            finish(**options)

        ddp.finish_grad_sync = finish_last
    tokens = torch.ones((), dtype=torch.int, device="cuda")
    coordinator.zero_grad_buffer()
    coordinator.finalize_model_grads([model], tokens if per_token else None)
    store.set(f"{key} {dist.get_rank()}", "yes")
    infra.destroy()
    return True


@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "mean"])
def test_encoder_ranks_do_not_wait_for_the_language_model(per_token):
    assert all(world(3).run("test_finalize:_finish_in_turn", per_token))


# -- the path without DDP's help -------------------------------------------------------------------


def test_a_factor_that_cancels_needs_no_pass():
    from megatron_mimo_coord.megatron.ddp import _product

    assert all(_product(1 / size, size) == 1.0 for size in range(1, 5000))
    assert 1 / 49 * 49 != 1.0


def _finalize_without_coordinator() -> list[float]:
    """Gradients that Megatron's own finalize makes of a model that a coordinator has seen.

    Each rank's gradients are all its number, plus 1.
    """
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads

    infra, model, coordinator = built(Case(modules=FAN_IN, ddp=MANY_BUCKETS))
    coordinator.zero_grad_buffer()
    coordinator.finalize_model_grads([model])
    found = []
    for _ in range(2):
        for ddp, groups in _ddps(model, infra):
            ddp.zero_grad_buffer()
            for buffer in ddp.buffers:
                buffer.grad_data.fill_(dist.get_rank() + 1)
            ddp.start_grad_sync()
            finalize_model_grads([ddp], None, pg_collection=groups)
            found += {float(each) for buffer in ddp.buffers for each in buffer.grad_data.unique()}
    infra.destroy()
    return found


def test_a_coordinated_model_still_works_with_megatrons_own_finalize():
    """Open, the coordinator's factor stays on the buckets: 2 x the mean over the two replicas."""
    ranks = world(3).run("test_finalize:_finalize_without_coordinator")
    assert ranks == [[2 * (1 + 2) / 2] * 2] * 2 + [[3.0] * 2]
