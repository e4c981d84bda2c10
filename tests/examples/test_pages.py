"""Images that are dealt out by cost, in the digits example and in the benchmark of whole steps."""

import sys
from argparse import Namespace
from itertools import islice

import pytest
from layouts import parallel
from ranks import world

PAGES = ["--images-per-sample", "8", "--global-batch-size", "32", "--micro-batch-size", "16"]
THREE_RANKS = ["--vision-dp", "2", "--language-pp", "1"]


def test_a_page_has_a_place_for_each_image():
    ((blank, answers, spelled),) = world(1).run("test_pages:_texts")
    text, places = blank
    assert len(text) == 17 and text.count(28) == 8  # two images of four patches
    assert [text[place] for place in places] == [27, 27]
    assert answers == ["seven", "zero"] and spelled == ["seven"]


def _texts():
    import digits

    seven = digits.answer([7], 1)
    return digits.blank(2, 3), digits.words([7, 0], 8), digits.words([*seven, 3, 3], 1)


def test_pages_teach_the_same_whoever_encodes_them():
    ranks = world(3).run("test_pages:_train", [*THREE_RANKS, *PAGES])
    for slices, assigned in ranks:
        assert assigned["losses"] == pytest.approx(slices["losses"], rel=1e-5)
        assert max(assigned["imbalance"]) < 1.1 < max(slices["imbalance"])
        assert len(assigned["words"]) == 40 and set(assigned["words"]) <= set(slices["names"])
        # Close weights; where two letters are as likely as each other, either may come out.
        same = sum(map(str.__eq__, assigned["words"], slices["words"]))
        assert same >= 38


def _train(arguments):
    """Three steps and what is read then: in slices, and assigned."""
    import digits
    import digits_options
    import digits_trainer

    found = []
    learn, held_out = digits.load()
    for more in ([], ["--assign"]):
        sys.argv = ["", *arguments, *more, "--steps", "3"]
        options = digits_options.parse_options()
        trainer = digits_trainer.Trainer.build(options)
        steps = list(islice(digits_trainer.train(trainer, learn, held_out, options, 0), 3))
        found.append(
            {
                "losses": [step.loss for step in steps],
                "imbalance": [step.imbalance for step in steps],
                "words": trainer.read(held_out.images[:40]),
                "names": [*digits.NAMES, "no numeral"],
            }
        )
        trainer.model.destroy()
        trainer.infra.destroy()
    return found


def test_the_benchmark_of_steps_measures_each_way():
    ((even, skewed), *_) = world(3).run("test_pages:_measure")
    assert set(even["seconds"]) == {"Megatron", "slices", "assigned"}
    assert even["imbalance"] == {"slices": [1.0, 1.0], "assigned": [1.0, 1.0]}
    assert all(load > 1.5 for load in skewed["imbalance"]["slices"])
    assert all(load < 1.1 for load in skewed["imbalance"]["assigned"])
    # Each image takes 1 ms forward and 2 ms backward: no step can be shorter than its sleep.
    assert min(skewed["seconds"]["assigned"]) > 0.02


def _measure():
    import steps

    options = Namespace(
        encoder="sleeping",
        milliseconds=1.0,
        micro_batch_size=8,
        microbatches=2,
        rounds=2,
        shared=False,
        ahead=0,
    )
    modules = {"vision": parallel(dp=2), "language": parallel()}
    with steps.Bench.build(modules, options) as bench:
        return (
            bench.measure(("Megatron", "slices", "assigned"), "none"),
            bench.measure(("slices", "assigned"), "sorted"),
        )
