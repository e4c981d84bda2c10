"""Texts that the ranks of the language model share, and whose length does not divide by them.

``MimoModel`` would refuse such a text on some ranks alone. So it runs a longer one, and the step
goes on to where all ranks hear of it.
"""

import torch

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.misfits import Misfit, Misfits
from megatron_mimo_coord.megatron.forwards import Given, as_one_text, bounds_of
from megatron_mimo_coord.megatron.mimo_model import (
    packed_sample_parts,
    packing_problem,
    sequence_parts,
)


def make_texts_even(job: Job, assignments: PendingAssignments, misfits: Misfits) -> None:
    """Have the model on this rank run no text that its ranks cannot share.

    Args:
        job: the model, and the modules on this rank.
        assignments: which count microbatches.
        misfits: are told of such a text; raise in an evaluation.
    """
    model = job.model
    parts, _ = sequence_parts(model)
    sample_parts = packed_sample_parts(model)

    def make_even(given: Given) -> Given | None:
        text, packing = given.get("input_ids"), given.get("packing_kwargs")
        if text is None:
            return None
        at, length = assignments.microbatch, text.shape[-1]
        divisor, why = sequence_parts(model, is_packed=packing is not None)
        problem = "" if packing is None else packing_problem(model, packing)
        if not problem and length % divisor:
            problem = (
                f"the texts are {length} tokens long, which {divisor} ({why}) does not divide: pad "
                f"input_ids, position_ids, labels and loss_mask to {_padded(length, divisor)}"
            )
        if problem:
            misfits.tell(Misfit((at, -1), f"microbatch {at}: {problem}"))
            return as_one_text(given, -length % parts)
        if packing is not None and sample_parts > 1:
            misfits.tell(_uneven_samples(at, bounds_of(packing), sample_parts, why))
        return None

    if parts > 1 and model.language_model is not None:
        job.forwards.watch(make_even)


def _uneven_samples(microbatch: int, bounds: torch.Tensor, parts: int, why: str) -> Misfit:
    """Packed samples that are cut by themselves, if the device finds that they cannot be.

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
            f"{_padded(length, parts)}, and say so in cu_seqlens_q_padded and cu_seqlens_kv_padded"
        )

    return Misfit((microbatch, -1), sentence, (bounds.diff() % parts != 0).any())


def _padded(length: int, parts: int) -> int:
    return -(-length // parts) * parts
