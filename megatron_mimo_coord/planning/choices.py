"""What a layout is sought for, and all ways to lay out one module."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from itertools import accumulate, pairwise, product

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.estimates import forward_flops
from megatron_mimo_coord.planning.memory import stage_memory
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.size_problems import sharding_problems


@frozen(kw_only=True)
class Request:
    """What a layout is sought for.

    Args:
        sizes: of each module.
        gpus: most ranks of a layout.
        gpus_per_node: ranks that share a node.
        global_batch_size: samples in a step.
        memory_bytes: of a GPU, for one rank.
        costs: what a module of some sizes costs in a layout.
        cluster: how fast messages are.
        micro_batch_size: the only microbatch to consider, over all ranks; None for every one.
    """

    sizes: Mapping[str, ModuleSizes]
    gpus: int
    gpus_per_node: int
    global_batch_size: int
    memory_bytes: float
    costs: Callable[[str, ModuleSizes, ModuleParallelism], ModuleCosts]
    cluster: Cluster
    micro_batch_size: int | None = None

    @property
    def encoders(self) -> list[str]:
        """All modules but the language model."""
        return [name for name in self.sizes if name != LANGUAGE]

    @property
    def distributed_optimizer(self) -> bool:
        """Whether replicas share the optimizer's work, as far as all modules say so."""
        return all(sizes.use_distributed_optimizer for sizes in self.sizes.values())

    def allocated(self, ranks: int) -> int:
        """GPUs that must be rented for so many ranks: whole nodes, as far as there are."""
        nodes = -(-ranks // self.gpus_per_node)
        return min(self.gpus, nodes * self.gpus_per_node)


@frozen(eq=False, slots=False)
class Choice:
    """One way to lay out one module.

    Args:
        request: what a layout is sought for.
        name: of the module.
        sizes: with what it recomputes.
        parallelism: its parallel sizes.
    """

    request: Request
    name: str
    sizes: ModuleSizes
    parallelism: ModuleParallelism

    @cached_property
    def costs(self) -> ModuleCosts:
        """Of the module in this layout."""
        return self.request.costs(self.name, self.sizes, self.parallelism)

    @cached_property
    def gpus(self) -> int:
        """Ranks that it takes."""
        return self.parallelism.size

    @property
    def replicas(self) -> int:
        """DP."""
        return self.parallelism.data_parallel_size

    @property
    def stages(self) -> int:
        """PP."""
        return self.parallelism.pipeline_model_parallel_size

    @cached_property
    def ways(self) -> "list[Choice]":
        """The same with more and more recomputed."""
        _, *more = recomputations(self.request.sizes[self.name])
        return [self, *(evolve(self, sizes=sizes) for sizes in more)]

    @cache  # noqa: B019 - a search is over when its command is
    def held(self, samples: int, behind: int = 0, waiting: int = 0) -> float:
        """Bytes on the fullest rank: of the first, the second or the last stage.

        Args:
            samples: of a microbatch, over all ranks.
            behind: stages of the language model that follow, or microbatches that are held besides.
            waiting: microbatches whose images' tokens wait on the first stage.
        """
        number = self.request.global_batch_size // samples
        return max(
            stage_memory(
                self.name,
                {**self.request.sizes, self.name: self.sizes},
                self.parallelism,
                stage,
                micro_batch_size=samples,
                in_flight=min(number, behind + self.stages - stage),
                waiting=waiting or None,
            ).total
            for stage in {0, min(1, self.stages - 1), self.stages - 1}
        )


def divisors(number: int) -> list[int]:
    """All divisors, the smaller ones first.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def choices(request: Request, name: str) -> list[Choice]:
    """Every way to lay out a module, those on fewer GPUs first.

    TP divides the GPUs of a node, PP the layers, DP the global batch; a language model may also
    have stages of unequal numbers of layers, and CP that leaves each rank ``LEAST_TOKENS``. Experts
    are whole or shared like the rest of a layer: expert TP is 1 or TP.
    """
    sizes = request.sizes[name]
    every = [Choice(request, name, sizes, each) for each in _parallelisms(request, name)]
    return sorted(every, key=lambda choice: choice.gpus)


@cache
def recomputations(sizes: ModuleSizes) -> list[ModuleSizes]:
    """A module with nothing recomputed, what costs little, MLPs too, and everything.

    Only as it is, if its sizes say what to recompute or it has no backward.

    Example:
        >>> words = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
        >>> [each.recomputed for each in recomputations(words)]
        ['', 'layernorm', 'layernorm, mlp', 'full']
    """
    if sizes.recompute_granularity is not None or (sizes.frozen and not sizes.is_language):
        return [sizes]
    cheap = ["layernorm"]
    if not sizes.has_flash_attention:
        cheap.insert(0, "core_attn")
    if sizes.num_moe_experts:
        cheap.append("moe_act")
    kinds = {sizes.has_experts(layer) for layer in range(sizes.num_layers)}
    dear = [*cheap, *(["mlp"] if False in kinds else []), *(["moe"] if True in kinds else [])]
    selective = (
        evolve(sizes, recompute_granularity="selective", recompute_modules=tuple(modules))
        for modules in (cheap, dear)
    )
    full = evolve(
        sizes,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return [sizes, *selective, full]


LEAST_TOKENS = 4096
"""Of a sequence, that context-parallel ranks of the search have at least."""

MOST_UNEQUAL = 16
"""Stages of a pipeline of which the search makes some shorter than others."""


def _parallelisms(request: Request, name: str) -> Iterator[ModuleParallelism]:
    sizes = request.sizes[name]
    pipelines = [{"pipeline_model_parallel_size": pp} for pp in divisors(sizes.num_layers)]
    if name == LANGUAGE and request.costs(name, sizes, ModuleParallelism()).layers_per_stage:
        pipelines += _unequal_stages(sizes, min(MOST_UNEQUAL, request.gpus, sizes.num_layers))
    most = sizes.sequence // LEAST_TOKENS if name == LANGUAGE else 1
    contexts = [2**power for power in range(max(1, most).bit_length())]
    for tp, cp in product(divisors(request.gpus_per_node), contexts):
        for pipeline in pipelines:
            alone = ModuleParallelism(
                tensor_model_parallel_size=tp, context_parallel_size=cp, **pipeline
            )
            if alone.size > request.gpus or any(sharding_problems(name, sizes, alone)):
                continue
            for dp in divisors(request.global_batch_size):
                if alone.size * dp > request.gpus:
                    break
                for expert_tp, ep in _expert_sizes(sizes, tp, cp * dp):
                    yield evolve(
                        alone,
                        data_parallel_size=dp,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=expert_tp,
                    )


@cache
def _unequal_stages(sizes: ModuleSizes, most: int) -> list[dict[str, int]]:
    """For each PP the numbers of layers with the least work on the slowest stage, if unequal."""
    total, found = sizes.num_layers, []
    of_layers = (forward_flops(sizes, sizes.hidden_size, range(i, i + 1)) for i in range(total))
    before = [0.0, *accumulate(of_layers)]  # work of all layers before one

    def slowest(first: int, middle: int, last: int) -> float:
        starts = [0, *range(first, total - last + 1, middle or total), total - last, total]
        return max(before[stop] - before[start] for start, stop in pairwise(starts))

    for pp in range(2, most + 1):
        ways = [
            (first, middle, total - middle * (pp - 2) - first)
            for middle in (range(1, (total - 2) // (pp - 2) + 1) if pp > 2 else [0])
            for first in range(1, total - middle * (pp - 2))
        ]
        first, middle, last = min(ways, key=lambda way: (slowest(*way), -way[2], way[0]))
        if len({first, middle or first, last}) > 1:
            ends = {
                "num_layers_in_first_pipeline_stage": first,
                "num_layers_in_last_pipeline_stage": last,
            }
            found.append({"pipeline_model_parallel_size": pp, **ends})
    return found


def _expert_sizes(sizes: ModuleSizes, tp: int, replicas: int) -> Iterator[tuple[int, int]]:
    """Pairs of (expert TP, EP) that divide the experts and the ranks of a stage."""
    if sizes.num_moe_experts is None:
        yield tp, 1
        return
    for expert_tp in sorted({1, tp}):
        for ep in divisors(sizes.num_moe_experts):
            if sizes.moe_ffn_hidden_size % expert_tp == 0 and tp * replicas % (expert_tp * ep) == 0:
                yield expert_tp, ep
