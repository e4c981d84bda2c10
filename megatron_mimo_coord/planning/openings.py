"""Which single change of a model's sizes would open layouts that they shut out."""

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import evolve

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.planning.candidates import ALIKE
from megatron_mimo_coord.planning.choices import Request, divisors
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.search import propose
from megatron_mimo_coord.planning.size_problems import sharding_problems


def openings(request: Request, seconds: float | None) -> Iterator[str]:
    """Changes that make more TP possible and the best step shorter, each as a sentence.

    Args:
        request: what a layout is sought for.
        seconds: of the best step as the model is; None if no layout fits.
    """
    for name, sizes in request.sizes.items():
        for tp in reversed(divisors(request.gpus_per_node)):
            if change := one_change(name, sizes, tp):
                changed = {**request.sizes, name: evolve(sizes, **change)}
                best = next(iter(propose(evolve(request, sizes=changed), 1)), None)
                if best and (seconds is None or best.timeline.seconds < seconds * (1 - ALIKE)):
                    field, value = next(iter(change.items()))
                    before = "no layout fits" if seconds is None else f"{seconds:.4g} s"
                    yield (
                        f"{name} with {field} {value} instead of {getattr(sizes, field)} could "
                        f"have TP {tp}: {best.timeline.seconds:.4g} s a step instead of {before}"
                    )
                break  # a smaller TP divides that too


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
