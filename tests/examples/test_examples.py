"""The examples, started as a user starts them."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.image
import pytest
from jobs import run_job
from ranks import world

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


READ = r"^read (\d+) of (\d+) held-out images right: accuracy ([\d.]+%)$"
TWO_RANKS = ("--vision-dp", "1", "--language-pp", "1")
BATCH = ("--global-batch-size", "128", "--micro-batch-size", "128")
SHAPE = ("--steps", "80", *BATCH, "--lr", "5e-3", "--loss", "per-token")


def test_the_digits_model_learns_to_read(tmp_path):
    """With the encoder on both ranks of a language model whose ranks share the texts.

    What it reads is what it knows by plain forwards, and the same wherever it goes on.
    """
    log, saved, layout = (tmp_path / name for name in ("losses", "saved", "layout.toml"))
    layout.write_text(
        "[vision]\ndata_parallel_size = 2\nrank_offset = 0\n"
        "[language]\ncontext_parallel_size = 2\nrank_offset = 0\n"
    )
    code, output = run_job(
        EXAMPLES / "train_digits_vlm.py",
        *("--layout", str(layout), *SHAPE, "--eval-interval", "40", "--log-losses", str(log)),
        *("--save", str(saved), "--save-interval", "80"),
        ranks=2,
    )
    assert code == 0, output
    (found,) = re.findall(READ, output, re.MULTILINE)
    right, of = map(int, found[:2])
    assert of == 360 and right > 72, "51 are what naming one digit gets"
    assert found[2] == f"{right / of:.1%}"
    by_digit = re.findall(r"\w+ (\d+)/(\d+)", output[output.index("read ") :])
    assert [sum(map(int, each)) for each in zip(*by_digit, strict=True)] == [right, of]
    evaluated = dict(re.findall(r"^step (\d+)/80 .*accuracy ([\d.]+%)", output, re.MULTILINE))
    assert evaluated["80"] == found[2] != next(iter(evaluated.values()))
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 80 and losses[0] == pytest.approx(math.log(32), rel=0.1)
    assert losses[-1] < 1

    assert world(1).run(_known, saved) == [right]
    code, output = run_job(
        EXAMPLES / "train_digits_vlm.py",
        *("--vision-dp", "1", "--language-pp", "1", "--language-dp", "2"),
        *(*SHAPE, "--load", str(saved)),
        ranks=3,
    )
    assert code == 0, output
    assert f"goes on after step 80, from {saved / 'step-00000080'}" in output
    assert re.findall(READ, output, re.MULTILINE) == [found]


def _known(saved: Path) -> int:
    """Held-out images whose every letter is likeliest behind the true letters before it.

    A greedy reader reads exactly these: its letters are the true ones as long as all were.
    """
    import digits
    import digits_options
    import digits_trainer
    import torch

    sys.argv = ["", "--colocated", *TWO_RANKS, *SHAPE, "--load", str(saved)]
    options = digits_options.parse_options()
    trainer = digits_trainer.Trainer.build(options)
    trainer.coordinator.load_checkpoint(saved, None)
    _, held_out = digits.load()
    whole, spelled = [], []
    for digit in held_out.digits.tolist():
        letters = [digits.LETTERS.index(letter) for letter in digits.NAMES[digit]] + [digits.END]
        pad = [digits.END] * (digits.NAME_LENGTH - len(letters))
        whole.append([digits.IMAGE] * digits.PATCHES + [digits.SEPARATOR] + letters + pad)
        spelled.append(len(letters))
    text = torch.tensor(whole)
    with torch.no_grad():
        logits, _ = trainer.model(
            input_ids=text[:, :-1],
            position_ids=torch.arange(text.shape[1] - 1).expand(len(text), -1),
            modality_inputs={"vision": {"images": digits.patches(held_out.images)}},
        )
    likeliest = logits[..., : digits.END + 1].argmax(-1)
    known = 0
    for row, answer, length in zip(likeliest, text, spelled, strict=True):
        places = slice(digits.PATCHES, digits.PATCHES + length)
        known += bool((row[places] == answer[1:][places]).all())
    trainer.model.destroy()
    trainer.infra.destroy()
    return known


def test_a_digits_job_that_has_not_learned_to_read_fails(tmp_path):
    """On the ranks of a layout file; what it was told to record is there all the same."""
    timeline, plot, layout = (
        tmp_path / name for name in ("timeline.json", "curve.png", "layout.toml")
    )
    layout.write_text(
        "[vision]\ndata_parallel_size = 2\n[language]\npipeline_model_parallel_size = 2\n"
    )
    code, output = run_job(
        EXAMPLES / "train_digits_vlm.py",
        *("--steps", "6", "--layout", str(layout), "--timeline", str(timeline)),
        *("--plot", str(plot), "--eval-interval", "6"),
        ranks=4,
    )
    assert code == 1
    ((right, of, _),) = re.findall(READ, output, re.MULTILINE)
    (counts,) = world(1).run(_digits_held_out)
    most_frequent = max(counts)
    assert int(right) <= most_frequent
    assert f"gets {most_frequent} of {of} right, and this model {right}" in output
    assert "too few steps, 6" in output
    assert re.search(r"^vision +0-1 .* 32 .*fan-in 2:1", output, re.MULTILINE)
    assert re.search(r"^language +2-3 +1 +1 +2 ", output, re.MULTILINE)
    assert "1437 images to learn from, 360 held out" in output
    # Of three steps of four microbatches, each rank's forwards and backwards.
    spans = [
        (each["pid"], each["tid"], each["name"].split()[0])
        for each in json.loads(timeline.read_text())["traceEvents"]
        if each["ph"] == "X"
    ]
    counts = Counter(spans)
    for kind in ("forward", "backward"):
        assert sorted(n for (*_, name), n in counts.items() if name == kind) == [12] * 4
    shares = re.search(
        r"^vision +(\d+)% +(\d+)% +(\d+)% +(\d+)% +(\d\.\d\d)$", output, re.MULTILINE
    )
    assert shares and sum(map(int, shares.groups()[:4])) in range(98, 103)
    assert 1 <= float(shares[5]) <= 2, "largest / mean work of two ranks"
    assert matplotlib.image.imread(plot).shape == (600, 700, 4)


def _digits_held_out() -> list[int]:
    """How often each digit is among the held-out images."""
    import digits

    return digits.load()[1].digits.bincount().tolist()


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
