"""A training goes on as if nothing had happened, on the same ranks or others."""

import json
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from layouts import SHARDED, parallel
from ranks import world

TIED = {"tied_embeddings": True, "per_token": {"vision": True, "audio": True, "language": True}}
# All of four ranks: two encoders; of a language model TP, PP, DP or experts; modules that share
# ranks apart from the language model, and with it.
APART = {"vision": parallel(), "audio": parallel(), "language": parallel(pp=2)}
SHARING = {
    "vision": parallel(dp=2, rank_offset=0),
    "audio": parallel(tp=2, rank_offset=0),
    "language": parallel(tp=2, rank_offset=2),
}
TOGETHER = {
    "vision": parallel(tp=2, dp=2, rank_offset=0),
    "audio": parallel(dp=4, rank_offset=0),
    "language": parallel(tp=2, dp=2, rank_offset=0),
}


def whole_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, as Megatron's own ``load`` reads them."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor, load

    found = json.loads((path / "checkpoint.json").read_text())["content"]["tensors"]
    empty = {
        key: torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
        for key, tensor in found.items()
    }
    sharded = {key: ShardedTensor.from_rank_offsets(key, empty[key]) for key in empty}
    loaded = load(sharded, str(path), validate_access_integrity=False)
    return {key: loaded[key] for key in empty}


def chain(cases: list[Case], folder: Path) -> list[Any]:
    """Train on the first layout; load and save on each, back to the first; go on there."""
    import torch
    from trainings import training

    with training(cases[0]) as first:
        before = first.steps(0, 2)
        saved = first.coordinator.save_checkpoint(folder / "0", first.optimizer, step=2)
        undisturbed = first.steps(2, 4)
    states = [whole_tensors(saved.path)]
    rates = []
    for number, case in enumerate([*cases[1:], cases[0]], 1):
        with training(case, lr=0.7) as other:
            found = other.coordinator.load_checkpoint(folder / str(number - 1), other.optimizer)
            assert found == (2, {}), found
            saved = other.coordinator.save_checkpoint(folder / str(number), other.optimizer, step=2)
            rates += [group["lr"] for group in other.optimizer.param_groups]
            after = other.steps(2, 4)
            assert [loss for loss, _ in after] == pytest.approx(
                [loss for loss, _ in undisturbed], rel=1e-5
            )
        states.append(whole_tensors(saved.path))
    assert after == undisturbed, "the same layout, bit for bit"
    assert set(rates) == {0.05}
    for number, state in enumerate(states):
        assert state.keys() == states[0].keys(), number
        different = [name for name in state if not torch.equal(state[name], states[0][name])]
        assert not different, (number, different)
    return [before, len(states[0])]


@pytest.mark.parametrize("ddp", [{}, {**SHARDED, "bucket_size": 100}], ids=["whole", "sharded"])
def test_what_is_saved_is_the_same_on_every_layout(ddp, tmp_path):
    cases = [Case(modules=modules, ddp=ddp, **TIED) for modules in (APART, SHARING, TOGETHER)]
    (losses, count), *others = world(4).run(chain, cases, tmp_path)
    assert count > 50
    assert all(other == [losses, count] for other in others)
