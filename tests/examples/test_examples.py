"""The examples, started as a user starts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import run_job

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_digits_model_learns(tmp_path):
    log, plot, layout = tmp_path / "losses", tmp_path / "curve.png", tmp_path / "layout.toml"
    layout.write_text(
        "[vision]\ndata_parallel_size = 2\n[language]\npipeline_model_parallel_size = 2\n"
    )
    code, output = run_job(
        EXAMPLES / "train_digits_vlm.py",
        *("--steps", "15"),
        *("--log-losses", str(log), "--plot", str(plot), "--eval-interval", "15"),
        *("--layout", str(layout), "--timeline", str(tmp_path / "timeline.json")),
        ranks=4,
    )
    assert code == 0, output
    assert re.search(r"^vision +\d+% +\d+% +\d+% +\d\.\d\d$", output, re.MULTILINE)
    assert len(json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]) > 100
    assert re.search(r"^vision +0-1 .* 32 .*fan-in 2:1", output, re.MULTILINE)
    assert re.search(r"^language +2-3 +1 +1 +2 ", output, re.MULTILINE)
    assert re.search(r"step 15/15 +loss \d", output)
    assert "1437 images to learn from, 360 held out" in output
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 15
    assert losses[-1] < 0.75 * losses[0]
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision-rank-offset", "1"], "rank 0 of 4 is in no module"),
        (
            ["--micro-batch-size", "1", "--global-batch-size", "4"],
            "micro_batch_size 1 is not divisible by the DP 2 of module vision",
        ),
        (["--language-dp", "3", "--language-pp", "1"], "the world has 4 ranks"),
        (["--layout", "layout.toml"], "layout.toml:2 [vision] data_parallel_size, layout.toml:4"),
        (["--layout", "layout.toml"], "layout.toml has the modules vision, language, audio"),
        (["--layout", "layout.toml", "--vision-dp", "3"], "leave out --vision-data-parallel"),
        (["--layout", "nothing.toml"], "nothing.toml cannot be read"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options, message, tmp_path):
    (tmp_path / "layout.toml").write_text(
        "[vision]\ndata_parallel_size = 2\n[language]\ndata_parallel_size = 3\n[audio]\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_digits_vlm.py", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    "example",
    [
        "train_digits_vlm",
        "benchmark_finalize",
        "compare_layouts",
        "predict_and_measure",
        "benchmark_step",
    ],
)
def test_help_explains_without_torchrun(example):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "--help" in done.stdout


def test_the_benchmark_measures():
    code, output = run_job(
        EXAMPLES / "benchmark_finalize.py",
        *("--rounds", "2"),
        *("--encoder-hidden", "64", "--language-hidden", "64"),
        *("--encoder-layers", "1", "--language-layers", "1"),
        ranks=3,
    )
    assert code == 0, output
    assert "per-token" in output
    assert "coordinator/functional" in output
