"""Which single change of a model's sizes, or of the batch, would open layouts they shut out."""

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import evolve

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.choices import Request, divisors
from megatron_mimo_coord.planning.layouts import ALIKE, Layout
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.search import propose
from megatron_mimo_coord.planning.size_problems import sharding_problems

OTHER_BATCH = 0.1
"""Part by which a batch may differ from another that is named instead."""

WORTH_A_BATCH = 0.05
"""More samples a second by which another batch is named: it changes how a model learns."""


def openings(request: Request, best: Layout | None, *, per_gpu: bool = False) -> Iterator[str]:
    """Changes of one size, or of the batch, with which the best layout is better: a sentence each.

    Args:
        request: what a layout is sought for.
        best: the best layout as the request is; None if none fits.
        per_gpu: what is best, as :func:`propose` takes it.
    """

    def better(margin: float, **changed: Any) -> Layout | None:
        """The best with something changed, if it takes a smaller part of what a sample takes."""
        found = next(iter(propose(evolve(request, **changed), 1, per_gpu=per_gpu)), None)
        if not found or not best:
            return found
        now, then = (
            (each.allocated if per_gpu else 1) / each.samples_per_second for each in (best, found)
        )
        return found if then < now * (1 - margin) else None

    for name, sizes in request.sizes.items():
        for tp in reversed(divisors(request.gpus_per_node)):
            if change := one_change(name, sizes, tp):
                changed = {**request.sizes, name: evolve(sizes, **change)}
                if found := better(ALIKE, sizes=changed):
                    field, value = next(iter(change.items()))
                    before = f"{best.timeline.seconds:.4g} s" if best else "no layout fits"
                    yield (
                        f"{name} with {field} {value} instead of {getattr(sizes, field)} could "
                        f"have TP {tp}: {found.timeline.seconds:.4g} s a step instead of {before}"
                    )
                break  # a smaller TP divides that too
    batch, micro = request.global_batch_size, request.micro_batch_size or 1
    whole = max(1, round(batch / request.gpus)) * request.gpus
    if whole == batch or abs(whole - batch) > OTHER_BATCH * batch or whole % micro:
        return
    if found := better(WORTH_A_BATCH, global_batch_size=whole):
        before = f"{best.samples_per_second:.4g}" if best else "no layout that fits"
        yield (
            f"with {whole} samples a step, which {request.gpus} GPUs divide, instead of {batch}: "
            f"{found.samples_per_second:.4g} samples/s instead of {before}"
        )


def one_change(name: str, sizes: ModuleSizes, tp: int) -> Mapping[str, Any]:
    """The only size to change so that TP divides a module, and its next multiple; empty if none.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=1280, num_attention_heads=20)
        >>> one_change("audio", sizes, 8), one_change("audio", sizes, 4)
        ({'num_attention_heads': 24, 'num_query_groups': 24, 'kv_channels': 64}, {})
    """
    layout = ModuleParallelism(tensor_model_parallel_size=tp)
    wrong = [
        field
        for field in ("num_attention_heads", "ffn_hidden_size", "vocab_size")
        if (getattr(sizes, field) or 0) % tp
    ]
    if len(wrong) != 1:
        return {}
    (field,) = wrong
    change = {field: -(-getattr(sizes, field) // tp) * tp}
    if field == "num_attention_heads":
        if sizes.num_query_groups == sizes.num_attention_heads:
            change["num_query_groups"] = change[field]
        change["kv_channels"] = sizes.kv_channels
    return {} if any(sharding_problems(name, evolve(sizes, **change), layout)) else change
