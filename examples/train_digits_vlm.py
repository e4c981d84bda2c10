"""Teaches a vision encoder and a language model, each on its own ranks, to read handwritten digits.

    torchrun --nproc-per-node 4 examples/train_digits_vlm.py

The images are the 1,797 that scikit-learn ships. The model sees one, cut into patches, and spells
out which digit it is, letter by letter. At the end it reads images that it was never trained on.
"""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from digits_options import parse_options, what_is_wrong

from megatron_mimo_coord.training.checkpoint_folder import checkpoint_path, claim

IS_MAIN = os.environ.get("RANK", "0") == "0"  # the rank that speaks for all


def main() -> None:
    """Check the options, train, read, tell."""
    with first_rank_speaks():
        options = parse_options(__doc__)
        problems = what_is_wrong(options)
        if not problems and IS_MAIN and options.save and not claim(options.save):
            problems = (
                f"another training writes into --save {options.save}; end it (its torchrun may be "
                f"gone already), or give another folder"
            )
        if problems:
            print(problems, file=sys.stderr, flush=True)
            sys.exit(2)
    with quiet():  # heavy imports wait until the options are known to be good
        import digits
        import digits_report
        from digits_trainer import Trainer, train
        from job import start_ranks

        start_ranks(options.rehearse)
        trainer = Trainer.build(options)
    done = 0
    if options.load:
        done, _ = trainer.coordinator.load_checkpoint(options.load, trainer.optimizer)
    learn, held_out = digits.load()
    steps = train(trainer, learn, held_out, options, done)
    if IS_MAIN:
        print(trainer.coordinator.describe(options.micro_batch_size))
        print(f"{len(learn.digits)} images to learn from, {len(held_out.digits)} held out")
        if done:
            print(f"goes on after step {done}, from {checkpoint_path(options.load, done)}")
        elif options.load:
            print(f"no whole checkpoint in {options.load}: starts from the beginning")
        print()
        steps = digits_report.with_progress(steps, options.steps)
        if options.log_losses:
            steps = digits_report.with_log(steps, options.log_losses, done)
    left, recording = options.steps - done, None
    if options.timeline and left > 0:
        last = range(max(left - 3, 0), left)
        recording = trainer.coordinator.record_timeline(options.timeline, last)
    history = list(steps)
    words = trainer.read(held_out.images)
    failure = digits_report.failure(held_out, words, history, options)
    if IS_MAIN:
        digits_report.show_reading(held_out, words)
        if recording:
            print(f"\n{recording.summary}\n\nthe trace is in {options.timeline}")
        if options.plot:
            digits_report.plot(history, options.plot)
        if failure:
            print(f"\n{failure}", flush=True)
    trainer.destroy()
    sys.exit(bool(failure))


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Keep the other ranks silent, and alive until the first has spoken.

    torchrun ends all ranks as soon as one of them exits with an error. A rank that is still there
    two seconds later is the only one with something to say, and says it.
    """
    if IS_MAIN:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        time.sleep(2)
        if end.code:
            print(said.getvalue(), file=sys.stderr, flush=True)
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and while libraries are imported their log: none is about this training."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
