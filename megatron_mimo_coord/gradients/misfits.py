"""What is wrong with a microbatch, as a rank found it, and the sentence about it."""

from collections.abc import Sequence

import torch
from attrs import frozen

from megatron_mimo_coord.layout.problems import listed


@frozen
class TextMisfit:
    """Texts that have another number of an encoder's tokens than it made for them.

    Args:
        module: the encoder.
        microbatch: in its pass.
        counts: the encoder's tokens in each text.
        cut: the rows that end with one of them.
        tokens: that the encoder made.
        is_part: whether other ranks' texts share these tokens.
        first: number of the first of these samples in the microbatch.
    """

    module: str
    microbatch: int
    counts: Sequence[int]
    cut: Sequence[int]
    tokens: int
    is_part: bool = False
    first: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """Which of several is told: the lowest."""
        return self.microbatch, 1, not self.cut, self.first

    def __str__(self) -> str:
        last = self.first + len(self.counts) - 1
        cut = "".join(
            f"; the text of sample {self.first + row} ends among them, as if it was cut"
            for row in self.cut[:1]
        )
        others = ", and for other samples with them" if self.is_part else ""
        return (
            f"microbatch {self.microbatch}: the texts of samples {self.first} to {last} have "
            f"{sum(self.counts)} tokens of {self.module} ({', '.join(map(str, self.counts[:8]))}), "
            f"but its encoder made {self.tokens} for them{others}{cut}: leave out the images of "
            f"what is cut from a text, and give each rank its slice of the samples, their images "
            f"and their input_ids"
        )


@frozen
class UnknownParts:
    """Tokens of an encoder for several ranks, whose texts do not say how many are for which.

    Args:
        module: the encoder.
        microbatch: in its pass.
        tokens: that it made.
        ranks: of the language model, that they are for.
        texts: that its rank was given: rows of ``input_ids``, or samples of a packed row.
        is_packed: whether it was given a packed row.
        first: the encoder's DP rank.
    """

    module: str
    microbatch: int
    tokens: int
    ranks: int
    texts: int
    is_packed: bool
    first: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """Before texts that do not fit, which may be no other mistake."""
        return self.microbatch, 0, self.first

    def __str__(self) -> str:
        kind = "packed samples" if self.is_packed else "rows"
        given = f"input_ids of {self.texts} {kind}" if self.texts else "no input_ids"
        return (
            f"microbatch {self.microbatch}: DP rank {self.first} of {self.module} made "
            f"{self.tokens} tokens for {self.ranks} ranks of the language model, but was given "
            f"{given}, which do not say how many are for whom: pass the model input_ids of that "
            f"rank's samples, as many rows for each of these ranks (or one row of as many samples "
            f"for each, with their cu_seqlens_q in packing_kwargs), or deal the images out with "
            f"coordinator.assign_images"
        )


@frozen
class UnevenLength:
    """Texts whose tokens the ranks of the language model cannot share.

    Args:
        microbatch: in its pass.
        length: of the texts, in tokens.
        parts: what would divide it.
        why: whose ranks share it.
    """

    microbatch: int
    length: int
    parts: int
    why: str

    @property
    def order(self) -> tuple[int, ...]:
        """Before what follows from it."""
        return self.microbatch, -1

    def __str__(self) -> str:
        return (
            f"microbatch {self.microbatch}: the texts are {self.length} tokens long, which "
            f"{self.parts} ({self.why}) does not divide: pad input_ids, position_ids, labels and "
            f"loss_mask to {-(-self.length // self.parts) * self.parts}"
        )


@frozen
class OtherWidth:
    """Tokens of an encoder that cannot stand among those of a text.

    Args:
        module: the encoder.
        width: numbers of each of its tokens.
        hidden_size: of the language model.
    """

    module: str
    width: int
    hidden_size: int

    @property
    def order(self) -> tuple[int, ...]:
        """Before all others: it is so in every microbatch."""
        return (-1,)

    def __str__(self) -> str:
        return (
            f"the tokens of {self.module} have {self.width} numbers, but the language model's "
            f"hidden_size is {self.hidden_size}: project them to it, with a module in "
            f"input_projections of its VisionModalitySubmodules, or by another output size"
        )


@frozen
class UnknownInputs:
    """Inputs of which a replica that has none, but meets others that do, cannot make empty ones.

    Args:
        module: the encoder.
        kind: class of what was given.
    """

    module: str
    kind: str

    @property
    def order(self) -> tuple[int, ...]:
        """Before what follows from it."""
        return -1, 1

    def __str__(self) -> str:
        return (
            f"the replicas of {self.module} meet in its forward, and one has no inputs: it is to "
            f"run an empty batch, but what others were given holds a {self.kind}, of which it "
            f"cannot be told what an empty one is: pass tensors, numbers, strings, lists and dicts"
        )


@frozen
class PartsOfGradients:
    """Copies of weights that tensor-parallel ranks would move apart.

    Args:
        module: whose.
        weights: their names.
    """

    module: str
    weights: Sequence[str]

    @property
    def order(self) -> tuple[int, ...]:
        """Before all others but one."""
        return -1, 2

    def __str__(self) -> str:
        return (
            f"the tensor-parallel ranks of {self.module} have other gradients of the same weights "
            f"({listed(self.weights)}), and would move them apart: have each get the sum, by "
            f"parameter.sequence_parallel = True where a weight is applied to parts of a "
            f"sequence, and by copy_to_tensor_model_parallel_region(output, "
            f"group=pg_collection.tp) where its output feeds shards, as that of an adapter's first "
            f"layer does; what is a shard itself is to be one of Megatron's layers, or "
            f"parameter.tensor_model_parallel = True"
        )


@frozen
class UncutRow:
    """A row of packed samples that context-parallel ranks cannot share.

    Args:
        microbatch: in its pass.
        problem: why.
    """

    microbatch: int
    problem: str

    @property
    def order(self) -> tuple[int, ...]:
        """Before what follows from it."""
        return self.microbatch, -1

    def __str__(self) -> str:
        return f"microbatch {self.microbatch}: {self.problem}"


@frozen
class UnevenSamples:
    """Packed samples, each of which context-parallel ranks share; whether they can, a device knows.

    Args:
        microbatch: in its pass.
        bounds: where each sample begins, and the last one ends.
        parts: what would divide the tokens of each.
        why: whose ranks share them.
    """

    microbatch: int
    bounds: torch.Tensor
    parts: int
    why: str

    @property
    def order(self) -> tuple[int, ...]:
        """Before what follows from it."""
        return self.microbatch, -1

    @property
    def is_so(self) -> torch.Tensor:
        """On the device."""
        return (self.bounds.diff() % self.parts != 0).any()

    def __str__(self) -> str:
        lengths = self.bounds.diff().tolist()
        sample = next(each for each, length in enumerate(lengths) if length % self.parts)
        return (
            f"microbatch {self.microbatch}: packed sample {sample} of a row is {lengths[sample]} "
            f"tokens long, which {self.parts} ({self.why}) does not divide, and each is cut by "
            f"itself: pad it to {-(-lengths[sample] // self.parts) * self.parts}, and say so in "
            f"cu_seqlens_q_padded and cu_seqlens_kv_padded"
        )


Misfit = (
    TextMisfit
    | UnknownParts
    | UnevenLength
    | OtherWidth
    | UnknownInputs
    | PartsOfGradients
    | UncutRow
    | UnevenSamples
)
