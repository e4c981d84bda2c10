"""About how long a step of a layout takes, by a closed formula; for ranking layouts.

A pipeline's first microbatch passes all stages forward and back, and each further one takes as long
as the slowest stage needs for it (Narayanan et al. 2021, arXiv 2104.04473, 2.2.1, for unequal
stages). Of several encoders the slowest counts. Modules on the same ranks take turns.
"""

from megatron_mimo_coord.layout import LANGUAGE, runs_encoders_first
from megatron_mimo_coord.planning.durations import Durations


def pipeline_seconds(step: Durations, num_microbatches: int, encoder: str | None = None) -> float:
    """A step with modules on ranks of their own: the language model, and perhaps an encoder."""
    work, links = stages(step, LANGUAGE)
    reduction, update = step.reduction(LANGUAGE, 0), _update(step, LANGUAGE)
    if encoder:
        its_work, its_links = stages(step, encoder)
        learns = step.has_backward(encoder, len(its_links))
        its_links.append(max(_over_bridge(step, encoder, learns)))
        # The language model reduces while the encoder still runs backward, two thirds of its work.
        after = 2 / 3 * (sum(its_work) + 2 * sum(its_links)) if learns else 0.0
        reduction = max(step.reduction(encoder, 0), reduction - after)
        update = max(_update(step, encoder), update)
        work, links = its_work + work, its_links + links
    first = sum(work) + 2 * sum(links)
    further = max(map(sum, zip(work, [0.0, *links], [*links, 0.0], strict=True)))
    return first + (num_microbatches - 1) * further + reduction + update


def turn_seconds(step: Durations, num_microbatches: int, encoder: str, repeated: bool) -> float:
    """What an encoder on ranks of the language model adds to a step.

    Args:
        step: with the two modules.
        num_microbatches: in the step.
        encoder: its name.
        repeated: whether its forwards run once more before its backwards.
    """
    learns = step.has_backward(encoder, 0)
    each = step.forward(encoder, 0, num_microbatches) * (2 if repeated and learns else 1)
    each += step.backward(encoder, 0, num_microbatches)
    if runs_encoders_first(step.grids):
        each += sum(_over_bridge(step, encoder, learns))
    else:
        each += step.exchange(encoder) * (2 if learns else 1)
    return num_microbatches * each + step.reduction(encoder, 0) + _update(step, encoder)


def stages(step: Durations, module: str) -> tuple[list[float], list[float]]:
    """(each stage's work on a microbatch, forward and back; messages between two of them)."""
    every = range(step.grids[module].dim("pp"))
    work = [step.forward(module, stage) + step.backward(module, stage) for stage in every]
    return work, [step.between_stages(module, stage) for stage in every[:-1]]


def _update(step: Durations, module: str) -> float:
    """The optimizer's, on the stage with the largest share."""
    return max(step.optimizer(module, each) for each in range(step.grids[module].dim("pp")))


def _over_bridge(step: Durations, encoder: str, learns: bool) -> tuple[float, float]:
    """The messages of a microbatch: (forward, back)."""
    forward = step.over_bridge(encoder, forward=True)
    return forward, step.over_bridge(encoder, forward=False) if learns else 0.0
