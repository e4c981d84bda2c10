"""About how long a step of a layout takes, by a closed formula; for ranking layouts.

A pipeline's first microbatch passes all stages forward and back, and each further one takes as long
as the slowest stage needs for it (Narayanan et al. 2021, arXiv 2104.04473, 2.2.1, for unequal
stages). Of several encoders the slowest counts. Modules on the same ranks take turns. Where a
message's ranks are not known yet, it goes over as many as it takes at least.
"""

from megatron_mimo_coord.planning.choices import Choice
from megatron_mimo_coord.planning.durations import busiest


def pipeline_seconds(
    language: Choice, encoder: Choice | None, samples: int, microbatches: int
) -> float:
    """A step with modules on ranks of their own: the language model, and one of its encoders.

    Args:
        language: the language model.
        encoder: what sends to it; None for nothing.
        samples: of a microbatch, over all ranks.
        microbatches: in a step.
    """
    hop, first = language.hop(samples), samples * language.work[0]
    once = language.whole(samples) + 2 * (language.stages - 1) * hop
    each = max(
        language.slowest(samples) + min(language.stages - 1, 2) * hop,
        first + (hop if language.stages > 1 else 0.0),
    )
    if encoder is None:
        end = language.reduction + language.optimizer
        return once + (microbatches - 1) * each + end
    ahead, back = bridge_seconds(encoder, language, samples)
    own_hop = encoder.hop(samples)
    uneven = samples * encoder.costs.unevenness(encoder.replicas, samples)
    before = encoder.whole(uneven) + 2 * (encoder.stages - 1) * own_hop + ahead + back
    each = max(
        each,
        first + max(ahead, back) + hop,
        encoder.slowest(uneven) + own_hop + max(ahead, back),
    )
    step = once + before + (microbatches - 1) * each
    # The language model reduces while the encoder still runs backward, two thirds of its work.
    after = 2 / 3 * before if encoder.has_backward else 0.0
    end = max(encoder.reduction, language.reduction - after)
    return step + end + max(encoder.optimizer, language.optimizer)


def turn_seconds(
    encoder: Choice, language: Choice, samples: int, microbatches: int, repeated: bool
) -> float:
    """What an encoder on ranks of the language model adds to a step.

    Args:
        encoder: the encoder.
        language: the language model.
        samples: of a microbatch, over all ranks.
        microbatches: in a step.
        repeated: whether its forwards run once more before its backwards.
    """
    uneven = samples * encoder.costs.unevenness(encoder.replicas, samples * microbatches)
    work = encoder.whole(uneven)
    if repeated and encoder.has_backward:
        work += encoder.costs.forward_seconds(encoder.parallelism, 0, samples, microbatches)
    exchange = sum(bridge_seconds(encoder, language, samples))
    if encoder.gpus == language.gpus and encoder.replicas == language.replicas:
        exchange = 0.0  # each rank has its own tokens
    return microbatches * (work + exchange) + encoder.reduction + encoder.optimizer


def bridge_seconds(encoder: Choice, language: Choice, samples: int) -> tuple[float, float]:
    """The messages of a microbatch over a bridge: (forward, backward)."""
    parts = max(encoder.replicas, language.replicas)
    message = encoder.costs.output_bytes_per_sample * samples / parts
    reach = (0, max(encoder.gpus, language.gpus))

    def seconds(sender: Choice, receiver: Choice) -> float:
        count = busiest(sender.parallelism, receiver.parallelism)
        return encoder.cluster.message_seconds(reach, count * message)

    forward = seconds(encoder, language)
    return forward, seconds(language, encoder) if encoder.has_backward else 0.0
