"""What train_digits_vlm.py tells: progress while it trains, then what the model reads."""

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from digits import NAMES, Digits, drawn
from digits_trainer import Progress
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

PLAIN_LINES = 20  # of progress, where there is no terminal
SHOWN, SHOWN_WRONG = 8, 2  # images drawn at the end, and how many of them misread, if so many are
console = Console(highlight=False)


def with_progress(steps: Iterable[Progress], total: int) -> Iterator[Progress]:
    """Pass the steps on; show them in a line that updates, or some and the last in plain ones."""
    bar = ProgressBar(
        BarColumn(20), TextColumn("{task.description}"), console=console, disable=not _live()
    )
    accuracy = None
    with bar:
        task = bar.add_task("starting", total=total)
        for progress in steps:
            accuracy = progress.accuracy if progress.accuracy is not None else accuracy
            line = _line(progress, total, accuracy)
            bar.update(task, completed=progress.step, description=line)
            is_due = progress.step % max(1, total // PLAIN_LINES) == 0 or progress.step == total
            if is_due and not _live():
                print(line, flush=True)
            yield progress


def _live() -> bool:
    return console.is_terminal


def _line(progress: Progress, total: int, accuracy: float | None) -> str:
    norm = progress.grad_norm
    parts = [
        f"step {progress.step}/{total}",
        f"loss {progress.loss:.4f}",
        "step skipped" if norm is None else f"gradient norm {norm:.2f}",
        f"{progress.images_per_second:,.0f} images/s",
        f"{progress.seconds_left:.0f} s left",
    ]
    if progress.imbalance != 1:
        parts.insert(3, f"imbalance {progress.imbalance:.2f}")
    if accuracy is not None:
        parts.insert(3, f"held-out accuracy {accuracy:.1%}")
    return "  ".join(parts)


def with_log(steps: Iterable[Progress], path: Path, done: int) -> Iterator[Progress]:
    """Pass the steps on; write one JSON line each, behind those of the first ``done`` steps."""
    if done:
        _cut_log(path, done)
    with path.open("a" if done else "w") as file:
        for progress in steps:
            line = {
                "step": progress.step,
                "loss": progress.loss,
                "grad_norm": progress.grad_norm,
            }
            print(json.dumps(line), file=file, flush=True)
            yield progress


def _cut_log(path: Path, done: int) -> None:
    """Drop the lines of later steps, the last of which may have been written in part."""
    with path.open("ab+") as file:
        file.seek(0)
        kept = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > done:
                break
            kept += len(line)
        file.truncate(kept)


def show_reading(held_out: Digits, words: Sequence[str]) -> None:
    """Accuracy, that of each digit, and a few of the images with what was read in them."""
    truth = [NAMES[digit] for digit in held_out.digits.tolist()]
    is_right = [word == name for word, name in zip(words, truth, strict=True)]
    console.print(
        f"\nread {sum(is_right)} of {len(truth)} held-out images right: "
        f"accuracy {held_out.accuracy(words):.1%}"
    )
    shares = []
    for name in NAMES:
        of_name = [right for right, other in zip(is_right, truth, strict=True) if other == name]
        shares.append(f"{name} {sum(of_name)}/{len(of_name)}")
    console.print("  ".join(shares) + "\n")
    wrong = [index for index, right in enumerate(is_right) if not right][:SHOWN_WRONG]
    fine = [index for index, right in enumerate(is_right) if right][: SHOWN - len(wrong)]
    pictures = [_picture(held_out, index, words[index], truth[index]) for index in fine + wrong]
    console.print(Columns(pictures, padding=(1, 2)))


def failure(
    held_out: Digits, words: Sequence[str], steps: Sequence[Progress], options: Namespace
) -> str:
    """Why the model reads no better than by always naming one digit; empty if it does read."""
    right = round(held_out.accuracy(words) * len(words))
    most_frequent = int(held_out.digits.bincount().max())
    if right > most_frequent:
        return ""
    skipped = sum(step.grad_norm is None for step in steps)
    if skipped:
        why = f"{skipped} steps were skipped, for their gradients were not finite: lower --lr "
        why += f"{options.lr:g}"
    elif steps and not steps[-1].loss < steps[0].loss:
        why = f"the loss went from {steps[0].loss:.4f} to {steps[-1].loss:.4f}: lower --lr "
        why += f"{options.lr:g}"
    else:
        why = f"too few steps, {options.steps}, or a low --lr, {options.lr:g}: the defaults read "
        why += "nearly all"
    return (
        f"the model has not learned to read: naming one digit everywhere gets {most_frequent} of "
        f"{len(words)} right, and this model {right}\n{why}"
    )


def _picture(held_out: Digits, index: int, word: str, name: str) -> Text:
    verdict = Text(f"✓ {word}", "green") if word == name else Text(f"✗ {word} ({name})", "red")
    return Text("\n").join((Text(drawn(held_out.images[index])), verdict))


def plot(steps: Sequence[Progress], path: Path) -> None:
    """Draw loss and held-out accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    above.plot([progress.step for progress in steps], [progress.loss for progress in steps])
    above.set(yscale="log", ylabel="loss")
    read = [progress for progress in steps if progress.accuracy is not None]
    below.plot(
        [progress.step for progress in read], [100 * progress.accuracy for progress in read], "o-"
    )
    below.set(xlabel="step", ylabel="held-out images read right, %", ylim=(0, 102))
    figure.savefig(path)
    console.print(f"\nloss and accuracy are drawn in {path}")
