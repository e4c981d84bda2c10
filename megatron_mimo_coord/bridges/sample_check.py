"""Do both ends of a bridge mean the same samples? Ranks that read others would train on garbage.

The encoder's hosts send a digest of each sample with every microbatch of assigned images. It is
compared with what this rank was given, at no collective and without the device.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NoReturn

from megatron_mimo_coord.bridges.headers import Header
from megatron_mimo_coord.layout.image_assignment import ImageAssignment


class SampleCheck:
    """Compares the samples of one encoder that arrive with those that this rank was given.

    A trainer calls ``assign_images`` when it reads a microbatch. In 1F1B that is after the
    microbatch was received; if it reads ahead, before. Whichever comes second compares. Once the
    forward of a microbatch has begun, calls are for later ones.

    Args:
        encoder: the module.
    """

    def __init__(self, encoder: str) -> None:
        self._encoder = encoder
        self._arrived: tuple[int, int, Header] | None = None
        self._may_be_given = False
        self._given: deque[ImageAssignment] = deque()

    def arrived(self, here: int, rank: int, header: Header) -> None:
        """On rank ``here`` a rank's header of the next microbatch."""
        self._arrived, self._may_be_given = (here, rank, header), True
        if self._given and header.digests:
            self._compare(self._given.popleft())

    def given(self, assignment: ImageAssignment) -> None:
        """What ``assign_images`` made on this rank."""
        if self._arrived is None or not self._may_be_given:
            self._given.append(assignment)
        else:
            self._compare(assignment)

    def begin_forward(self) -> None:
        """What has arrived is run: what ``assign_images`` makes from now on is for later ones."""
        self._may_be_given = False

    def set_aside(self) -> deque[ImageAssignment]:
        """Other microbatches run for a while: what this rank was given for those that wait."""
        self._arrived = None
        given, self._given = self._given, deque()
        return given

    def put_back(self, given: deque[ImageAssignment]) -> None:
        """Those microbatches run now."""
        self._arrived, self._given = None, given

    def withdraw(self, gone: Sequence[ImageAssignment]) -> None:
        """What was given for microbatches that will not run."""
        self._given = without(self._given, gone)

    def given_none(self) -> None:
        """This rank sends on without an assignment: the one before it must have had none either."""
        if self._arrived is not None:
            self._compare_with(())

    def _compare(self, assignment: ImageAssignment) -> None:
        self._compare_with(assignment.sample_digests)

    def _compare_with(self, digests: Sequence[int]) -> None:
        assert self._arrived is not None, "whichever comes second compares"
        (here, rank, header), self._arrived = self._arrived, None
        sent, mine = (rank, header.digests), (here, digests)
        refuse_other_samples(self._encoder, header.microbatch, sent, mine)


def without(
    some: Iterable[ImageAssignment], gone: Sequence[ImageAssignment]
) -> deque[ImageAssignment]:
    """Those that are not gone; two microbatches may have equal ones."""
    return deque(each for each in some if not any(each is other for other in gone))


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
