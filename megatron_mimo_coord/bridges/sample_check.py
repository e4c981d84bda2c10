"""Do both ends of a bridge mean the same samples? What is said where they do not."""

from collections.abc import Sequence
from typing import NoReturn


def refuse_other_samples(
    encoder: str,
    microbatch: int,
    one: tuple[int, Sequence[int]],
    other: tuple[int, Sequence[int]],
) -> None:
    """Compare what two ranks were given, each as (rank, digest of each sample).

    Raises:
        RuntimeError: they differ; names the ranks, the microbatch and the first sample.

    Example:
        >>> refuse_other_samples("vision", 2, (0, [11, 12]), (3, [11, 13]))
        Traceback (most recent call last):
        RuntimeError: microbatch 2: ranks 0 and 3 were given different samples for vision, the \
first that differs is sample 1 of 2 (in its id or in the tokens of its images): read the same \
samples in the same order on both
    """
    (rank, digests), (other_rank, other_digests) = one, other
    if tuple(digests) == tuple(other_digests):
        return
    if not digests or not other_digests:
        with_one, without = (rank, other_rank) if digests else (other_rank, rank)
        refuse_left_out(encoder, microbatch, with_one, without)
    if len(digests) != len(other_digests):
        what = f"{len(digests)} and {len(other_digests)} of them"
    else:
        pairs = zip(digests, other_digests, strict=True)
        first = next(sample for sample, (here, there) in enumerate(pairs) if here != there)
        what = (
            f"the first that differs is sample {first} of {len(digests)} (in its id or in the "
            f"tokens of its images)"
        )
    raise RuntimeError(
        f"microbatch {microbatch}: ranks {rank} and {other_rank} were given different samples for "
        f"{encoder}, {what}: read the same samples in the same order on both"
    )


def refuse_left_out(encoder: str, microbatch: int, with_one: int, without: int) -> NoReturn:
    """Of two ranks that hold an encoder, one was given an assignment and the other was not."""
    raise RuntimeError(
        f"microbatch {microbatch}: images of {encoder} were assigned on rank {with_one}, but not "
        f"on rank {without}: call assign_images once a microbatch, in the same order, on every "
        f"rank that holds {encoder}"
    )
