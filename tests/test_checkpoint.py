"""The digits example goes on as if nothing had happened, whatever happened to its ranks."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from shutil import copytree

import checkpoint
import pytest
from ranks import world

ROOT = Path(__file__).parent.parent
EXAMPLE = "examples/train_digits_vlm.py"
CAUSE = "the forward step of rank 1 failed"  # in faults.py
SMALL = ["--steps", "12", "--global-batch-size", "64", "--micro-batch-size", "32"]
TWO_RANKS = ["--vision-dp", "1", "--language-pp", "1"]


def start(script: str, *options: str, restarts: int = 0, faults: str = "") -> tuple[int, str]:
    """Exit code of a job of two ranks, and all that it printed, in that order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts), script]
    job = subprocess.Popen(
        [*command, *TWO_RANKS, *SMALL, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = job.communicate(timeout=240)
    finally:
        job.terminate()  # torchrun then ends its ranks
        job.wait(timeout=60)
    return job.returncode, output


# -- jobs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The log of a training that nothing happened to, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    log, saved = folder / "log", folder / "saved"
    code, output = start(
        EXAMPLE, "--log-losses", str(log), "--save", str(saved), "--save-interval", "5"
    )
    assert code == 0, output
    assert [path.name for path in sorted(saved.iterdir())] == ["step-00000010", "step-00000012"]
    return log.read_text(), saved


def test_a_job_that_loses_ranks_comes_back_by_itself(undisturbed, tmp_path):
    log, saved = tmp_path / "log", tmp_path / "saved"
    code, output = start(
        "tests/faults.py",
        *("--log-losses", str(log), "--save-interval", "5"),
        *("--save", str(saved), "--load", str(saved)),
        restarts=2,
        faults="killed_while_saving killed_in_a_step",
    )
    assert code == 0, output
    assert f"no whole checkpoint in {saved}: starts from the beginning" in output
    assert output.count(f"goes on after step 5, from {saved / 'step-00000005'}") == 2
    assert log.read_text() == undisturbed[0]
    assert [path.name for path in sorted(saved.iterdir())] == ["step-00000010", "step-00000012"]


def test_a_job_that_is_started_again_takes_only_the_steps_that_are_left(undisturbed, tmp_path):
    log, saved, plot = tmp_path / "log", tmp_path / "saved", tmp_path / "curve.png"
    copytree(undisturbed[1], saved)
    copytree(saved / "step-00000012", saved / f"step-00000013{checkpoint.UNFINISHED}")
    log.write_text(undisturbed[0] + '{"step": 13, "loss": 9}\n{"step": 1')
    code, output = start(
        EXAMPLE,
        *("--log-losses", str(log), "--plot", str(plot)),
        *("--save", str(saved), "--load", str(saved)),
    )
    assert code == 0, output
    assert "goes on after step 12" in output
    assert "of 360 held-out images right" in output
    assert "step 12/12" not in output
    assert log.read_text() == undisturbed[0]
    assert plot.stat().st_size > 1000


def test_the_first_thing_that_a_job_says_of_an_error_is_its_cause():
    code, output = start("tests/faults.py", faults="raises_in_a_step")
    assert code != 0
    errors = re.findall(r"^(?:\[rank\d\]: )?\w+Error: .*", output, re.MULTILINE)
    assert errors[0] == f"[rank1]: ArithmeticError: {CAUSE}"


# -- layouts ---------------------------------------------------------------------------------------

LAYOUTS = [
    "",  # vision DP 2, language PP 2
    "",
    "--vision-tp 2 --vision-dp 1 --language-pp 1 --language-dp 2",
    "--vision-pp 2 --vision-dp 1 --language-pp 1 --language-tp 2",
    "--colocated --vision-dp 4 --language-pp 1 --language-dp 2 --language-tp 2",
]


@pytest.mark.parametrize("optimizer", ["", "--distributed-optimizer --overlap-grad-reduce"])
def test_a_training_goes_on_from_layout_to_layout(optimizer, tmp_path):
    (expected,) = world(4).run("test_checkpoint:train", optimizer, 0, 10, None, None)[:1]
    losses = []
    load = None
    for layout in LAYOUTS:
        done, save = len(losses), tmp_path / f"{len(losses) + 2}"
        save.mkdir()
        options = f"{optimizer} {layout}"
        losses += world(4).run("test_checkpoint:train", options, done, 2, load, save)[0]
        load = save
    assert losses[:4] == expected[:4], "the same layout has the same losses, bit for bit"
    assert losses == pytest.approx(expected, rel=1e-5)


def train(
    arguments: str, done: int, steps: int, load: Path | None, save: Path | None
) -> list[float]:
    """Losses of some steps of a training of ten, from one checkpoint to the next; on every rank."""
    import digits
    import digits_options
    import digits_trainer
    import train_digits_vlm
    import training_state

    sys.argv = ["", "--steps", "10", *SMALL[2:], *arguments.split()]
    options = digits_options.parse_options()
    shape = digits_trainer.model_shape(options, train_digits_vlm.HIDDEN, digits_options.HEADS)
    trainer = digits_trainer.Trainer.build(digits_options.parallelism(options), shape, options)
    if load:
        training_state.load(trainer.model, trainer.optimizer, load)
    taken = islice(digits_trainer.train(trainer, *digits.load(), options, done), steps)
    losses = [progress.loss for progress in taken]
    if save:
        training_state.save(trainer.model, trainer.optimizer, save)
    trainer.model.destroy()
    trainer.infra.destroy()
    return losses


# -- options ---------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int, **settings: object) -> None:
    """One without weights: what is checked before torch is imported needs none."""
    defaults = {
        "seed": 1,
        "loss": "per-token",
        "global_batch_size": 256,
        "micro_batch_size": 64,
        "vision_layers": 2,
        "language_layers": 2,
        "distributed_optimizer": False,
    }
    checkpoint.begin(folder, step)
    checkpoint.finish(folder, step, {**defaults, **settings})


def refused(*options: str, rank: int = 0, **environment: str) -> str:
    """What a rank says when it refuses options."""
    done = subprocess.run(
        [sys.executable, EXAMPLE, *options],
        cwd=ROOT,
        env={
            **os.environ,
            **{"WORLD_SIZE": "4", "RANK": str(rank), "LOCAL_WORLD_SIZE": "4"},
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_another_training_than_that_of_the_checkpoint_is_refused(rank, tmp_path):
    make_checkpoint(tmp_path, 50, seed=3, language_layers=4)
    said = refused("--load", str(tmp_path), "--steps", "40", "--distributed-optimizer", rank=rank)
    assert "--seed is 1, but 3 in the checkpoint" in said
    assert "--language-layers is 2, but 4 in the checkpoint" in said
    assert "--distributed-optimizer is True, but False in the checkpoint" in said
    assert "--steps is 40" in said
    assert "vision-layers" not in said


def test_folders_that_cannot_be_meant_are_refused(tmp_path):
    make_checkpoint(tmp_path / "saved", 50)
    checkpoint.begin(tmp_path / "half", 50)
    half, saved, missing = (str(tmp_path / name) for name in ("half", "saved", "no/where"))
    assert f"--load {half} has no whole checkpoint" in refused("--load", half)
    assert f"--save {saved} already has checkpoints" in refused("--save", saved)
    said = refused("--save", missing, "--load", saved, "--save-interval", "5")
    assert "there is no folder" in said
    assert "--save-interval has no meaning" in refused("--save-interval", "5")
    said = refused("--save", half, TORCHELASTIC_MAX_RESTARTS="3")
    assert f"add --load {half}" in said


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_has_one_training_at_a_time(tmp_path):
    claim = "import checkpoint, pathlib, sys; print(checkpoint.claim(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", f"{claim}; sys.stdout.flush(); sys.stdin.read()", tmp_path]
    first = subprocess.Popen(
        command, cwd=ROOT / "examples", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "True\n"
        assert not checkpoint.claim(tmp_path)
        said = refused("--save", str(tmp_path))
        assert "another training writes into --save" in said
    finally:
        first.kill()
        first.wait(60)
    assert checkpoint.claim(tmp_path)


@pytest.mark.parametrize("calls", range(5))
def test_a_kill_between_any_two_renames_leaves_only_whole_checkpoints(tmp_path, monkeypatch, calls):
    for step in (5, 10):
        make_checkpoint(tmp_path, step)
    made = 0

    def killed_instead(method):
        def counting(*arguments, **options):
            nonlocal made
            made += 1
            if made > calls:
                raise KeyboardInterrupt
            return method(*arguments, **options)

        return counting

    monkeypatch.setattr(Path, "rename", killed_instead(Path.rename))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed_instead(checkpoint.shutil.rmtree))
    with suppress(KeyboardInterrupt):
        make_checkpoint(tmp_path, 15)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).step == (10 if calls == 0 else 15)
    make_checkpoint(tmp_path, 20)
    names = ["step-00000015", "step-00000020"] if calls else ["step-00000010", "step-00000020"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names


def test_a_folder_keeps_the_last_two_whole_checkpoints(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    for step in (5, 10, 15):
        make_checkpoint(tmp_path, step)
    checkpoint.begin(tmp_path, 20)
    newest = checkpoint.newest(tmp_path)
    assert newest.step == 15
    assert newest.settings["seed"] == 1
    checkpoint.begin(tmp_path, 25)  # what the checkpoint of step 20 left behind is gone
    names = ["step-00000010", "step-00000015", "step-00000025.unfinished"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names
