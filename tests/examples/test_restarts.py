"""The digits example goes on as if nothing had happened, whatever happened to its ranks."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import matplotlib.image
import pytest
from jobs import run_job
from ranks import world

from megatron_mimo_coord.training import checkpoint_folder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_digits_vlm.py"
CAUSE = "the forward step of rank 1 failed"  # in faults.py
SMALL = ["--steps", "12", "--global-batch-size", "64", "--micro-batch-size", "32"]
TWO_RANKS = ["--vision-dp", "1", "--language-pp", "1"]


# -- jobs ------------------------------------------------------------------------------------------


def test_a_job_that_loses_ranks_comes_back_by_itself(tmp_path):
    log, saved = tmp_path / "log", tmp_path / "saved"
    code, output = run_job(
        ROOT / "tests/examples/faults.py",
        *TWO_RANKS,
        *SMALL,
        *("--log-losses", str(log), "--plot", str(tmp_path / "curve.png"), "--eval-interval", "99"),
        *("--save", str(saved), "--load", str(saved), "--save-interval", "5"),
        ranks=2,
        restarts=3,
        FAULTS="killed_while_saving raises_in_a_step killed_while_reading",
    )
    assert code == 1, "twelve steps teach nothing, and the job says so"
    assert f"no whole checkpoint in {saved}: starts from the beginning" in output
    goes_on = f"goes on after step 5, from {saved / 'step-00000005'}"
    _, raising, _ = output.split(goes_on)
    errors = re.findall(r"^(?:\[rank\d\]: )?\w+Error: .*", raising, re.MULTILINE)
    assert errors[0] == f"[rank1]: ArithmeticError: {CAUSE}", "the cause is what it says first"
    once_more = output[output.index(f"goes on after step 12, from {saved / 'step-00000012'}") :]
    assert "step 12/12" not in once_more
    assert "of 360 held-out images right" in once_more
    assert matplotlib.image.imread(tmp_path / "curve.png").shape == (600, 700, 4)
    assert [path.name for path in sorted(saved.iterdir())] == ["step-00000010", "step-00000012"]
    assert [json.loads(line) for line in log.read_text().splitlines()] == undisturbed()


def undisturbed() -> list[dict[str, float]]:
    """What a job of two ranks logs if nothing happens to it."""
    return world(2).run(train, [*TWO_RANKS, *SMALL], 12)[0]


def train(arguments: list[str], steps: int) -> list[dict[str, float]]:
    """Take some steps; what a log has of them. On every rank."""
    import digits
    import digits_options
    import digits_trainer
    from cases import not_rehearsed

    sys.argv = ["", *arguments]
    options = digits_options.parse_options()
    with not_rehearsed():  # as in the job that this is compared with
        trainer = digits_trainer.Trainer.build(options)
        taken = list(islice(digits_trainer.train(trainer, *digits.load(), options, 0), steps))
    trainer.model.destroy()
    trainer.infra.destroy()
    return [{name: getattr(step, name) for name in ("step", "loss", "grad_norm")} for step in taken]


# -- reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "loss": 9}\n{"step": 4, "loss": 9}\n', '{"step": 3, "lo']
)
def test_a_log_goes_on_behind_the_steps_that_are_done(rest, tmp_path):
    log = tmp_path / "log"
    done = (
        '{"step": 1, "loss": 3.5, "grad_norm": 2.5}\n{"step": 2, "loss": 3.0, "grad_norm": null}\n'
    )
    log.write_text(done + rest)
    (line,) = world(1).run(log_a_skipped_step, log, 3, 2)
    assert log.read_text() == done + '{"step": 3, "loss": 2.5, "grad_norm": null}\n'
    assert "step 3/4  loss 2.5000  step skipped" in line
    world(1).run(log_a_skipped_step, log, 1, 0)
    assert log.read_text() == '{"step": 1, "loss": 2.5, "grad_norm": null}\n'


def log_a_skipped_step(path: Path, step: int, done: int) -> str:
    """Log a step whose gradient was not finite; the line of progress. On a rank."""
    import digits_report
    from digits_trainer import Progress

    progress = Progress(step, 2.5, None, 100.0, 10.0, None)
    list(digits_report.with_log([progress], path, done))
    return digits_report._line(progress, 4, None)


@pytest.mark.parametrize("total", [150, 400])
def test_some_steps_are_shown_and_the_last(total):
    (lines,) = world(1).run(shown, total)
    numbers = [int(re.match(rf"step (\d+)/{total}  loss", line)[1]) for line in lines]
    every = total // 20
    assert numbers == sorted({*range(every, total + 1, every), total})


def shown(total: int) -> list[str]:
    """The lines of a job without a terminal. On a rank."""
    from contextlib import redirect_stdout
    from io import StringIO

    import digits_report
    from digits_trainer import Progress

    steps = [Progress(step + 1, 2.5, 1.0, 100.0, 10.0, None) for step in range(total)]
    with redirect_stdout(StringIO()) as said:
        assert len(list(digits_report.with_progress(steps, total))) == total
    return said.getvalue().splitlines()


# -- options ---------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int, **settings: object) -> None:
    """One without weights: what is checked before torch is imported needs none."""
    defaults = {
        "seed": 1,
        "loss": "per-token",
        "global_batch_size": 256,
        "micro_batch_size": 64,
        "images_per_sample": 1,
        "vision_layers": 2,
        "language_layers": 2,
        "distributed_optimizer": False,
    }
    folder.mkdir(exist_ok=True)
    extra = {"settings": {**defaults, **settings}}
    unfinished = checkpoint_folder.begin(folder, step, 1)
    checkpoint_folder.finish(unfinished, {"step": step, "extra": extra, "files": {}}, 2)


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
    (tmp_path / "half").mkdir()
    checkpoint_folder.begin(tmp_path / "half", 50, 1)
    half, saved, missing = (str(tmp_path / name) for name in ("half", "saved", "no/where"))
    assert f"--load {half} has no whole checkpoint" in refused("--load", half)
    assert f"--save {saved} already has checkpoints" in refused("--save", saved)
    said = refused("--save", missing, "--load", saved, "--save-interval", "5")
    assert "there is no folder" in said
    assert "--save-interval has no meaning" in refused("--save-interval", "5")
    said = refused("--save", half, TORCHELASTIC_MAX_RESTARTS="3")
    assert f"add --load {half}" in said
