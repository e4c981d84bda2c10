"""A training goes on as if nothing had happened: on the same ranks or others, after kills too."""

import io
import json
import os
import random
import signal
import sys
from collections import Counter, OrderedDict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cases
import pytest
from cases import Case
from layouts import FAN_IN, MANY_BUCKETS, PER_TOKEN, SHARDED, parallel
from megatron.core import __version__ as megatron_version
from ranks import world
from trainings import GatedCase, SizedCase

from megatron_mimo_coord.training import checkpoint_folder
from megatron_mimo_coord.training.checkpoint_folder import checkpoint_path, checkpoint_steps

# All of four ranks: two encoders; of a language model TP, PP, DP and experts; modules that share
# ranks apart from the language model, with it, and with its stages.
APART = {"vision": parallel(), "audio": parallel(), "language": parallel(pp=2)}
LONG = {**APART, "language": parallel(context_parallel_size=2)}
SHARING = {
    "vision": parallel(dp=2, rank_offset=0),
    "audio": parallel(tp=2, rank_offset=0),
    "language": parallel(
        tp=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1, rank_offset=2
    ),
}
TOGETHER = {
    "vision": parallel(tp=2, dp=2, rank_offset=0),
    "audio": parallel(dp=4, rank_offset=0),
    "language": parallel(dp=4, expert_model_parallel_size=2, rank_offset=0),
}
AROUND = {
    "vision": parallel(dp=4, rank_offset=0),
    "audio": parallel(tp=2, rank_offset=2),
    "language": parallel(pp=2, dp=2, expert_model_parallel_size=2, rank_offset=0),
}
OVERLAPPED = {**SHARDED, **MANY_BUCKETS, "bucket_size": 100, "overlap_param_gather": True}


# -- layouts ---------------------------------------------------------------------------------------


def whole_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, each put together from what its files hold of it."""
    import torch

    files = {file.name: file.read_bytes() for file in path.glob("*.distcp")}
    tensors = json.loads((path / "checkpoint.json").read_text())["content"]["tensors"]
    found = {}
    with cases.not_rehearsed():
        for key, tensor in tensors.items():
            found[key] = torch.zeros(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
            for chunk in tensor["chunks"]:
                data = files[chunk["file"]][chunk["at"] : chunk["at"] + chunk["length"]]
                corner = zip(chunk["offset"], chunk["size"], strict=True)
                place = tuple(slice(start, start + number) for start, number in corner)
                found[key][place] = torch.load(io.BytesIO(data), weights_only=True)
    return found


def as_megatron_reads(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Some of the same on each rank, from Megatron's own ``load``. Collective."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor, load

    keys = sorted(tensors)[dist.get_rank() :: dist.get_world_size()]
    empty = {key: torch.empty_like(tensors[key]) for key in keys}
    sharded = {key: ShardedTensor.from_rank_offsets(key, empty[key]) for key in empty}
    loaded = load(sharded, str(path), validate_access_integrity=False)
    return {key: loaded[key] for key in empty}


def chain(cases: list[Case], folder: Path, tolerance: float) -> int:
    """Train on the first layout; load and save on each, back to the first; go on everywhere."""
    import torch
    from trainings import training

    with training(cases[0]) as first:
        first.steps(1)
        saved = first.coordinator.save_checkpoint(folder / "0", first.optimizer, step=2)
        undisturbed = first.steps(2, 3)
    expected = whole_tensors(saved.path)
    for key, tensor in as_megatron_reads(saved.path, expected).items():
        assert torch.equal(tensor, expected[key]), key
    for number, case in enumerate([*cases[1:], cases[0]], 1):
        with training(case, lr=0.7) as other:
            load, save = other.coordinator.load_checkpoint, other.coordinator.save_checkpoint
            assert load(folder / str(number - 1), other.optimizer) == (2, {})
            path = save(folder / str(number), other.optimizer, step=2).path
            if torch.distributed.get_rank() == 0:
                found = whole_tensors(path)
                assert found.keys() == expected.keys()
                different = [key for key in found if not torch.equal(found[key], expected[key])]
                assert not different, (number, different)
            losses = other.steps(2, 3)
            if number == len(cases):
                trained = other.fingerprint()
                for group in other.optimizer.param_groups:
                    group["lr"] = 0.0
                load(folder / "0", None)
                loaded = other.fingerprint()
                other.steps(2)
                assert other.fingerprint() == loaded != trained, "the optimizer knows the weights"
        assert [loss for loss, _ in losses] == pytest.approx(
            [loss for loss, _ in undisturbed], rel=tolerance
        )
    assert losses == undisturbed, "on the same layout, bit for bit"
    return len(expected)


@pytest.mark.parametrize(
    ("layouts", "first_stages", "ddps", "settings", "tolerance"),
    [
        (
            [APART, AROUND, TOGETHER],
            [1, 2, None],
            [{}] * 3,
            {"experts": 4, "tied_embeddings": True, "layers": 3},
            1e-5,
        ),
        (
            [TOGETHER, LONG, APART],
            [None] * 3,
            [OVERLAPPED, {}, SHARDED],
            {"experts": 4, "images": {"vision": (((2, 1),),)}},  # of twelve tokens
            1e-5,
        ),
        (
            [SHARING, APART],
            [None] * 2,
            [SHARDED, SHARDED],
            {"wrap": "submodules", "tied_embeddings": True},
            0.02,
        ),
    ],
    ids=["whole", "overlapped", "bf16"],
)
def test_what_is_saved_is_the_same_on_every_layout(
    layouts, first_stages, ddps, settings, tolerance, tmp_path
):
    """Stages may have unequal numbers of layers."""
    cases = [
        GatedCase(
            modules=modules,
            layers_in_first_stage=first,
            ddp=ddp,
            per_token=PER_TOKEN,
            num_microbatches=1,
            **settings,
        )
        for modules, first, ddp in zip(layouts, first_stages, ddps, strict=True)
    ]
    counts = world(4).run(chain, cases, tmp_path, tolerance, timeout=timedelta(minutes=2))
    assert set(counts) == {counts[0]}
    assert counts[0] > 100


def save_and_load(folder: Path, cases: list[Case]) -> list[float]:
    """Loss on the same data after each case has loaded what the one before has saved."""
    from trainings import training

    losses = []
    for step, case in enumerate(cases):
        with training(case) as one:
            assert one.coordinator.load_checkpoint(folder, one.optimizer).step == step
            one.coordinator.save_checkpoint(folder, one.optimizer, step=step + 1)
            losses.append(one.steps(0)[0][0])
    return losses


def test_a_vocabulary_may_be_padded_for_another_tensor_parallel_size(tmp_path):
    one, two = (
        SizedCase(
            modules={"vision": parallel(dp=3 - tp), "language": parallel(tp=tp)}, vocabulary=size
        )
        for tp, size in ((1, 17), (2, 18))
    )
    for losses in world(3).run(save_and_load, tmp_path, [one, two, one]):
        assert losses[2] == losses[0]
        assert losses[1] == pytest.approx(losses[0], rel=0.1), "one more token, of zeros"


# -- what else comes back --------------------------------------------------------------------------


def keep_everything(folder: Path) -> None:
    """Settings of the optimizer, random states of each rank, and what the trainer gives.

    A save needs no thread, as none can be started at the end of a process.
    """
    import threading

    import numpy
    import torch
    from counting import Counter as CollectiveCounter
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from trainings import training

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            forked = float(torch.rand(()))
        return [random.random(), float(numpy.random.rand()), float(torch.rand(())), forked]

    extra = {
        "scheduler": {"num_steps": 7, "lr": 1 / 3, "betas": (0.9, 0.95), "none": None},
        "milestones": Counter({3: 1, 5: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "order": torch.randperm(5, generator=torch.Generator().manual_seed(1)),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "raw": bytes(range(256)),
    }
    of_rank = {"order": 1000 * torch.distributed.get_rank() + torch.arange(1000)}
    with training(Case(modules=FAN_IN), weight_decay=0.1) as one:
        assert one.coordinator.load_checkpoint(folder / "nothing", one.optimizer) == (0, {})
        draws = draw()
        one.steps(0)
        one.optimizer.param_groups[0]["lr"] = 0.25
        given = {"extra": extra, "rank_state": of_rank}
        with CollectiveCounter() as counter, cases._replaced(threading.Thread, "start", fail):
            path = one.coordinator.save_checkpoint(
                folder, one.optimizer, step=1, **given, keep=1
            ).path
        assert sum("allgather" in name for name, _ in counter.collectives) == 4, "over the world"
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        for rank in range(3):
            data = (1000 * rank + torch.arange(1000)).numpy().tobytes()
            assert [name for name in files if data in files[name]] == [f"__{rank}_0.distcp"]
        for data in (extra["order"].numpy().tobytes(), extra["raw"]):
            assert [name for name in files if data in files[name]] == ["__0_0.distcp"]
        again = one.coordinator.save_checkpoint(folder, one.optimizer, step=1, **given)
        assert again.wait() == checkpoint_path(folder, 1), "written already"
        expected = draw()
        assert draws != expected
    with training(Case(modules=FAN_IN), weight_decay=0.1) as one:
        step, found = loaded = one.coordinator.load_checkpoint(folder, one.optimizer)
        assert draw() == expected
        assert step == 1
        assert found["raw"] == extra["raw"]
        assert torch.equal(loaded.rank_state["order"], of_rank["order"])
        for name in ("scheduler", "milestones", "ordered"):
            assert found[name] == extra[name]
        assert list(found["milestones"].elements()) == [3, 5, 5]
        assert list(found["ordered"]) == ["b", "a"]
        assert torch.equal(found["order"], extra["order"])
        assert found["scale"].dtype == torch.float64 and found["scale"] == 2.5
        assert found["empty"].dtype == torch.bfloat16 and found["empty"].shape == (0, 3)
        assert one.optimizer.param_groups[0]["lr"] == 0.25
        assert one.optimizer.param_groups[0]["weight_decay"] in (0.1, 0.0)
        again = partial(
            one.coordinator.save_checkpoint, folder, step=1, rank_state=loaded.rank_state
        )
        assert again(optimizer=one.optimizer, extra=found).path == checkpoint_path(folder, 1)
        assert "already has" in refusal(again, optimizer=one.optimizer, extra={**found, "a": 1})
        assert "already has" in refusal(again, optimizer=None, extra=found)
        one.steps(1)
        assert "already has" in refusal(again, optimizer=one.optimizer, extra=found)
    with training(Case(modules=FAN_IN)) as one:
        weights = one.fingerprint()
        assert one.coordinator.load_checkpoint(folder, None)[0] == 1
        assert one.fingerprint() != weights, "the weights alone"


def test_everything_that_was_saved_comes_back(tmp_path):
    world(3).run(keep_everything, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# -- in the background -----------------------------------------------------------------------------


def save_in_the_background(folder: Path) -> None:
    """Steps go on while a checkpoint is written; the next save waits for it, whoever saves."""
    import threading

    from trainings import training

    from megatron_mimo_coord import MultiModuleCoordinator
    from megatron_mimo_coord.training.checkpoint_save import Part

    may_write, write = threading.Event(), Part.write

    def write_when_allowed(self: Part, folder: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert may_write.wait(30)
        write(self, folder)

    Part.write = write_when_allowed
    try:
        with training(Case(modules=FAN_IN)) as one:
            one.steps(0)
            save = one.coordinator.save_checkpoint
            first = save(folder, one.optimizer, step=1, background=True)
            undisturbed = one.steps(1, 2)
            assert not checkpoint_steps(folder), "nobody has written"
            threading.Timer(0.5, may_write.set).start()
            other = MultiModuleCoordinator(one.coordinator._job.infra, one.model)
            second = other.save_checkpoint(folder, one.optimizer, step=3, background=True)
            assert checkpoint_steps(folder)[0] == 1
            assert first.wait() == checkpoint_path(folder, 1)
            assert second.wait() == checkpoint_path(folder, 3)
        if one.coordinator._job.rank == 0:
            checkpoint_folder._delete(second.path)
    finally:
        Part.write = write
    with training(Case(modules=FAN_IN)) as one:
        assert one.coordinator.load_checkpoint(folder, one.optimizer).step == 1
        assert one.steps(1, 2) == undisturbed, "what was saved is what was there at the save"


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    world(3).run(save_in_the_background, tmp_path)


def save_until_killed(folder: Path, rank: int, where: str, count: int) -> None:
    """Save every step in the background; a rank is killed at some call of a function."""
    import torch.distributed as dist
    from trainings import training

    from megatron_mimo_coord.training import checkpoint_folder, checkpoint_tensors

    owner = {"write_tensor": checkpoint_tensors.ChunkFile}.get(where, checkpoint_folder)
    function = getattr(owner, where)
    calls = 0

    def killed_instead(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, where, killed_instead)
    with training(Case(modules=FAN_IN)) as one:
        for step in range(1, 6):
            one.steps(step)
            one.coordinator.save_checkpoint(folder, one.optimizer, step=step, background=True)
            if dist.get_rank() == 0:
                (folder / f"saved {step}").touch()


def go_on(folder: Path, until: int) -> tuple[int, list[Any]]:
    from trainings import training

    with training(Case(modules=FAN_IN)) as one:
        done, _ = one.coordinator.load_checkpoint(folder, one.optimizer)
        losses = one.steps(*range(done + 1, until))
        one.coordinator.save_checkpoint(folder, one.optimizer, step=until)
        return done, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The steps of a job that nothing happens to."""
    (_, losses), *_ = world(3).run(go_on, tmp_path_factory.mktemp("undisturbed"), 6)
    return losses


@pytest.mark.parametrize(
    ("rank", "where", "count"),
    [(2, "write_tensor", 150), (0, "put_on_disk", 14), (0, "_delete", 2)],
    ids=["writing", "renaming", "deleting"],
)
def test_a_job_that_saves_every_step_loses_none_when_killed(
    rank, where, count, tmp_path, undisturbed
):
    answers, errors = world(3).try_run(save_until_killed, tmp_path, rank, where, count)
    assert not answers
    assert errors[rank][0] == "ProcessDied"
    begun = max(int(path.name.split()[1]) for path in tmp_path.glob("saved *"))
    (done, losses), *_ = world(3).run(go_on, tmp_path, 6)
    assert begun >= 2
    assert done >= begun - 1, "the save before the last had ended when the last began"
    assert losses == undisturbed[done:]


# -- refusals --------------------------------------------------------------------------------------


def change(path: Path, **content: Any) -> None:
    """Rewrite a manifest as if its writer had meant it."""
    document = json.loads((path / "checkpoint.json").read_text())
    document["content"] |= content
    document["sha256"] = checkpoint_folder._digest(document["content"])
    (path / "checkpoint.json").write_text(json.dumps(document))


def refuse_to_save(folder: Path) -> dict[str, str]:
    """What each wrong save says on this rank."""
    import torch
    import torch.distributed as dist
    from trainings import training

    rank = dist.get_rank()
    found = {}
    inside_itself: list[Any] = []
    inside_itself.append(inside_itself)
    with training(Case(modules=FAN_IN)) as one:
        save = one.coordinator.save_checkpoint
        save(folder / "saved", one.optimizer, step=5)
        wrong = {
            "object": {"extra": {"sampler": object()}},
            "key": {"extra": {1: 2}},
            "list": {"extra": [1]},
            "inside itself": {"extra": {"a": inside_itself}},
            "sparse": {"extra": {"a": torch.eye(2).to_sparse()}},
            "quantized": {
                "extra": {"a": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}
            },
            "differs": {"extra": {"rank": rank}},
            "tensor differs": {"extra": {"order": torch.arange(100) + (rank == 2)}},
            "folder": {"folder": folder / f"of {rank}"},
            "no path": {"folder": folder if rank else None},
            "file": {"folder": folder / "foreign" / "model.safetensors"},
            "step": {"step": -1},
            "huge": {"step": 10**30},
            "earlier": {"step": 4},
            "optimizer": {"optimizer": object()},
        }
        for name, given in wrong.items():
            options = {"folder": folder / "saved", "optimizer": one.optimizer, "step": 6} | given
            found[name] = refusal(save, **options)
        load = one.coordinator.load_checkpoint
        found["foreign"] = refusal(load, folder / "foreign", None)
        found["foreign file"] = refusal(load, folder / "foreign" / "model.safetensors", None)
        open_, opened = Path.open, folder / "full"
        Path.open = lambda path, *a, **o: (
            fail() if path.suffix == ".distcp" else open_(path, *a, **o)
        )
        try:
            found["full"] = refusal(save, folder=opened, optimizer=one.optimizer, step=6)
            started = save(opened, one.optimizer, step=7, background=True)
            found["full, background"] = refusal(save, folder=opened, optimizer=None, step=8)
            found["full, waited for again"] = refusal(started.wait)
            Path.open = lambda path, *a, **o: (
                sys.exit(3) if path.name == "__1_0.distcp" else open_(path, *a, **o)
            )
            started = save(opened, one.optimizer, step=7, background=True)
            found["exits"] = refusal(started.wait)
        finally:
            Path.open = open_
    return found


def fail() -> None:
    raise OSError(28, "No space left on device")


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{function} accepts {arguments} {options}")


def test_a_save_that_cannot_be_is_refused_on_every_rank(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").touch()
    answers = world(3).run(refuse_to_save, tmp_path)
    for said in answers:
        assert "extra['sampler'] is a object: a checkpoint takes dicts" in said["object"]
        assert "extra has the key 1: use strings" in said["key"]
        assert "extra['rank']: rank 0 has 0, rank 1 has 1, rank 2 has 2" in said["differs"]
        assert "extra['order']: rank 2 has {" in said["tensor differs"]
        assert len(said["tensor differs"]) < 500
        assert "extra is a list: give a dict" in said["list"]
        assert "more than 100 levels deep, or inside itself" in said["inside itself"]
        assert "extra['a'] is a Tensor: a checkpoint takes" in said["sparse"]
        assert "extra['a'] is a Tensor: a checkpoint takes" in said["quantized"]
        assert "folder: rank 0 has " in said["folder"]
        assert "cannot be saved" in said["no path"] and "TypeError" in said["no path"]
        assert "cannot be saved" in said["file"] and "FileExistsError" in said["file"]
        assert "cannot be loaded" in said["foreign file"]
        assert "has model.safetensors, but no checkpoint of this package" in said["foreign"]
        assert "0 or more, not 1000000000000000000000" in said["huge"]
        assert "step must be a number of steps, 0 or more, not -1" in said["step"]
        assert "already has a checkpoint of step 5: go on from it" in said["earlier"]
        assert "coordinator.build_optimizer makes" in said["optimizer"]
        for name in ("full", "full, background", "full, waited for again"):
            assert "could not be written" in said[name]
            assert "No space left on device" in said[name]
        assert "SystemExit" in said["exits"]
    assert checkpoint_steps(tmp_path / "saved") == [5]
    assert checkpoint_steps(tmp_path / "full") == []


def refuse_to_load(folder: Path, case: Case, settings: dict[str, Any]) -> tuple[str, bool]:
    """What a load says on this rank, and whether it left everything as it was."""
    from trainings import training

    with training(case, **settings) as one:
        before = one.fingerprint()
        said = refusal(one.coordinator.load_checkpoint, folder, one.optimizer)
        return said, one.fingerprint() == before


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(tmp_path):
    ranks, case = world(3), Case(modules=FAN_IN)
    ranks.run(go_on, tmp_path, 1)
    ranks.run(go_on, tmp_path, 2)
    path = checkpoint_path(tmp_path, 2)

    def refused(*words: str, **changes: Any) -> None:
        other, settings = changes.pop("case", case), changes.pop("settings", {})
        for said, is_unchanged in ranks.run(refuse_to_load, folder, other, settings):
            assert all(word in said for word in words), said
            assert is_unchanged

    folder = tmp_path
    manifest = (path / "checkpoint.json").read_text()
    refused(
        "num_layers of module 'language' is 2 in the checkpoint, 1 here",
        case=Case(modules=FAN_IN, layers=1),
    )
    refused(
        "num_attention_heads of module 'language' is 2 in the checkpoint, 4 here",
        case=SizedCase(modules=FAN_IN, heads=4),
    )
    for vocabulary, tp in ((8, 1), (24, 1), (24, 2)):
        modules = {"vision": parallel(dp=3 - tp), "language": parallel(tp=tp)}
        refused(
            f"word_embeddings.weight is [16, 16] in the checkpoint, [{vocabulary}, 16] here",
            case=SizedCase(modules=modules, vocabulary=vocabulary),
        )
    output = "language_model.output_layer.weight"
    refused(f"there is no {output} here", case=Case(modules=FAN_IN, tied_embeddings=True))
    refused("the checkpoint has no language_model", "router", case=Case(modules=FAN_IN, experts=4))
    refused(
        "the checkpoint has no optimizer.state.momentum_buffer",
        settings={"optimizer": "sgd", "sgd_momentum": 0.9},
    )
    change(path, **{"megatron-core": "0.18.2"})
    series = ".".join(megatron_version.split(".")[:2])
    refused(f"was written with megatron-core 0.18.2, and this is {series}")
    (path / "checkpoint.json").write_text(manifest)
    damaged = next(path.glob("__2_*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    refused(f"{damaged} is damaged", "to go on from step 1, delete this one")
    (path / "checkpoint.json").write_text(manifest.replace('"step": 2', '"step": 3'))
    refused("checkpoint.json is damaged")
    folder = path
    refused("no checkpoint of this package", "metadata.json")
