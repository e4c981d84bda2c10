"""What is wrong with a microbatch, as a rank found it, and the sentence about it.

Of several the one with the lowest order is told: what is so in every microbatch before what is
wrong with one, earlier microbatches first, and what others follow from before these.
"""

from collections.abc import Callable, Sequence

import torch
from attrs import frozen

from megatron_mimo_coord.layout.problems import listed


@frozen
class Misfit:
    """Something that all ranks are to hear of.

    Args:
        order: which of several is told.
        sentence: says what is wrong and what to change; asked once the step is over.
        is_so: on the device; None if the host knows that it is.
    """

    order: tuple[int, ...]
    sentence: Callable[[], str]
    is_so: torch.Tensor | None = None

    @property
    def holds(self) -> bool:
        """Whether it is so; waits for the device where only that knows."""
        return self.is_so is None or bool(self.is_so)


def _known(order: tuple[int, ...], sentence: str) -> Misfit:
    return Misfit(order, lambda: sentence)


def other_width(module: str, width: int, hidden_size: int) -> Misfit:
    """Tokens of an encoder that cannot stand among those of a text."""
    return _known(
        (-1,),
        f"the tokens of {module} have {width} numbers, but the language model's hidden_size is "
        f"{hidden_size}: project them to it, with a module in input_projections of its "
        f"VisionModalitySubmodules, or by another output size",
    )


def unknown_inputs(module: str, kind: str) -> Misfit:
    """Inputs of which a replica that has none, but meets others that do, cannot make empty ones."""
    return _known(
        (-1, 1),
        f"the replicas of {module} meet in its forward, and one has no inputs: it is to run an "
        f"empty batch, but what others were given holds a {kind}, of which it cannot be told what "
        f"an empty one is: pass tensors, numbers, strings, lists and dicts",
    )


def parts_of_gradients(module: str, weights: Sequence[str]) -> Misfit:
    """Copies of weights that tensor-parallel ranks would move apart."""
    return _known(
        (-1, 2),
        f"the tensor-parallel ranks of {module} have other gradients of the same weights "
        f"({listed(weights)}), and would move them apart: have each get the sum, by "
        f"parameter.sequence_parallel = True where a weight is applied to parts of a sequence, and "
        f"by copy_to_tensor_model_parallel_region(output, group=pg_collection.tp) where its output "
        f"feeds shards, as that of an adapter's first layer does; what is a shard itself is to be "
        f"one of Megatron's layers, or parameter.tensor_model_parallel = True",
    )


def uncut_row(microbatch: int, problem: str) -> Misfit:
    """A row of packed samples that context-parallel ranks cannot share."""
    return _known((microbatch, -1), f"microbatch {microbatch}: {problem}")


def uneven_length(microbatch: int, length: int, parts: int, why: str) -> Misfit:
    """Texts whose tokens the ranks of the language model cannot share."""
    return _known(
        (microbatch, -1),
        f"microbatch {microbatch}: the texts are {length} tokens long, which {parts} ({why}) does "
        f"not divide: pad input_ids, position_ids, labels and loss_mask to "
        f"{-(-length // parts) * parts}",
    )


def uneven_samples(microbatch: int, bounds: torch.Tensor, parts: int, why: str) -> Misfit:
    """Packed samples that context-parallel ranks share, if the device finds that they cannot.

    Args:
        microbatch: in its pass.
        bounds: where each sample begins, and the last one ends.
        parts: what would divide the tokens of each.
        why: whose ranks share them.
    """

    def sentence() -> str:
        lengths = bounds.diff().tolist()
        sample, length = next((n, each) for n, each in enumerate(lengths) if each % parts)
        return (
            f"microbatch {microbatch}: packed sample {sample} of a row is {length} tokens long, "
            f"which {parts} ({why}) does not divide, and each is cut by itself: pad it to "
            f"{-(-length // parts) * parts}, and say so in cu_seqlens_q_padded and "
            f"cu_seqlens_kv_padded"
        )

    return Misfit((microbatch, -1), sentence, (bounds.diff() % parts != 0).any())


def unknown_parts(
    module: str, microbatch: int, tokens: int, ranks: int, texts: int, is_packed: bool, dp_rank: int
) -> Misfit:
    """Tokens of an encoder for several ranks, whose texts do not say how many are for which.

    Args:
        module: the encoder.
        microbatch: in its pass.
        tokens: that it made.
        ranks: of the language model, that they are for.
        texts: that its rank was given: rows of ``input_ids``, or samples of a packed row.
        is_packed: whether it was given a packed row.
        dp_rank: the encoder's.
    """
    given = f"input_ids of {texts} {'packed samples' if is_packed else 'rows'}"
    return _known(
        (microbatch, 0, dp_rank),
        f"microbatch {microbatch}: DP rank {dp_rank} of {module} made {tokens} tokens for {ranks} "
        f"ranks of the language model, but was given {given if texts else 'no input_ids'}, which "
        f"do not say how many are for whom: pass the model input_ids of that rank's samples, as "
        f"many rows for each of these ranks (or one row of as many samples for each, with their "
        f"cu_seqlens_q in packing_kwargs), or deal the images out with coordinator.assign_images",
    )


def other_tokens(
    module: str,
    microbatch: int,
    counts: Sequence[int],
    tokens: int,
    dp_rank: int,
    cut: Sequence[int] = (),
    is_part: bool = False,
) -> Misfit:
    """Texts that have another number of an encoder's tokens than it made for them.

    Args:
        module: the encoder.
        microbatch: in its pass.
        counts: the encoder's tokens in each text.
        tokens: that the encoder made.
        dp_rank: whose texts these are.
        cut: the rows that end with one of them.
        is_part: whether other ranks' texts share these tokens.
    """
    first = dp_rank * len(counts)
    end = f"; the text of sample {first + cut[0]} ends among them, as if it was cut" if cut else ""
    return _known(
        (microbatch, 1, not cut, first),
        f"microbatch {microbatch}: the texts of samples {first} to {first + len(counts) - 1} have "
        f"{sum(counts)} tokens of {module} ({', '.join(map(str, counts[:8]))}), but its encoder "
        f"made {tokens} for them{', and for other samples with them' if is_part else ''}{end}: "
        f"leave out the images of what is cut from a text, and give each rank its slice of the "
        f"samples, their images and their input_ids",
    )
