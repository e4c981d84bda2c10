"""What the planning command is given: files and options, and everything that is wrong with them."""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from attrs import define, evolve, field

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism, pack, ranks_taken
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import Problem
from megatron_mimo_coord.layout.toml_file import LayoutFile
from megatron_mimo_coord.layout.toml_tables import TomlFile
from megatron_mimo_coord.planning.choices import Room, Task
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.costs_file import CLUSTER, CostsFile
from megatron_mimo_coord.planning.estimates import ASSUMPTIONS as OF_COSTS
from megatron_mimo_coord.planning.estimates import Accelerator, estimated_costs
from megatron_mimo_coord.planning.memory import ASSUMPTIONS as OF_MEMORY
from megatron_mimo_coord.planning.model_file import ModelFile
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.size_problems import sharding_problems

MICRO, GIGA = 1e-6, 1e9
SIZES = ("global_batch_size", "micro_batch_size")


@define
class Inputs:
    """What a plan is made of.

    Args:
        problems: all that is wrong, in types that JSON knows; then nothing else is there.
        task: what a layout is sought for.
        modules: the layout that is to be costed; None to seek one.
        micro_batch_size: that of the layout.
        assumptions: what the numbers rest on, for a user to read.
    """

    problems: list[dict[str, Any]] = field(factory=list)
    task: Task | None = None
    modules: Mapping[str, ModuleParallelism] | None = None
    micro_batch_size: int | None = None
    assumptions: list[str] = field(factory=list)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Inputs":
        """Read all files and look at all options."""
        reading = _Reading(options)
        if reading.problems:
            return cls(problems=reading.problems)
        model, layout, costs = reading.model, reading.layout, reading.costs
        assert model, "there are no problems"
        batch, samples = reading.job["global_batch_size"], reading.job.get("micro_batch_size")
        gpus = options.gpus or _whole_nodes(layout, options.gpus_per_node)
        cluster = _cluster(options, costs)
        task = Task(
            sizes=model.sizes,
            room=Room(gpus, options.gpus_per_node, batch),
            memory_bytes=options.memory - options.reserve,
            costs=_costs(model.sizes, options, cluster, costs.told if costs else {}),
            cluster=cluster,
            micro_batch_size=samples,
        )
        return cls(
            task=task,
            modules=layout and layout.modules,
            micro_batch_size=samples,
            assumptions=list(_assumptions(options, costs, cluster, model.sizes)),
        )


class _Reading:
    """The files, and what is wrong with them and with the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.problems: list[dict[str, Any]] = []
        self.model = self._read(ModelFile, options.model)
        self.costs = options.costs and self._read(CostsFile, options.costs)
        self.layout = options.layout and self._read(LayoutFile, options.layout)
        given = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
        self.job = {**(self.layout.job if self.layout else {}), **given}
        for file in filter(None, (self.model, self.costs)):
            self._tell(file.problems, file)
        if self.layout:
            self._tell(self._of_layout(self.layout), self.layout)
        if self.costs and self.model and not self.costs.problems:
            self._tell(self._of_costs(self.model, self.costs), self.costs)
        self._tell(self._of_options())

    def _read(self, kind: type[TomlFile], path: Any) -> Any:
        try:
            return kind.read(path)
        except ValueError as error:
            self._tell([Problem(str(error))])
            return None

    def _tell(self, problems: Iterable[Problem], file: TomlFile | None = None) -> None:
        for problem in problems:
            places = file.places(problem) if file else ()
            self.problems.append(
                {
                    "message": problem,
                    "places": [
                        {"module": module, "field": name, "line": line}
                        for module, name, line in places
                    ],
                    "text": file.located(problem) if file else problem,
                }
            )

    def _of_layout(self, layout: LayoutFile) -> Iterator[Problem]:
        yield from layout.problems_on(None)
        if layout.problems:
            return
        batch, samples = map(self.job.get, SIZES)
        for name, size in zip(SIZES, (batch, samples), strict=True):
            if size is None:
                yield Problem(f"{name} is not known; give --{name.replace('_', '-')}")
        if batch and samples:
            yield from batch_problems(pack(layout.modules).values(), batch, samples)
        ranks = ranks_taken(pack(layout.modules).values())
        if self.options.gpus and ranks > self.options.gpus:
            yield Problem(f"the layout takes {ranks} ranks, but --gpus is {self.options.gpus}")
        if self.model is None or self.model.problems:
            return
        for name, sizes in self.model.sizes.items():
            if name in layout.modules:
                yield from sharding_problems(name, sizes, layout.modules[name])
            else:
                yield Problem(f"the layout has no module {name}, which the model has: add [{name}]")
        for name, module in layout.modules.items():
            if name not in self.model.sizes:
                yield Problem(f"the model has no module {name}; remove it", (name, ""))
            known = self.costs.costs.get(name) if self.costs else None
            stages = known.layers_per_stage if known else None
            if stages is not None and len(stages) != module.pipeline_model_parallel_size:
                yield Problem(
                    f"{name} has PP {module.pipeline_model_parallel_size}, but its costs are of "
                    f"{len(stages)} stages: leave layers_per_stage out of {self.options.costs}",
                    (name, "pipeline_model_parallel_size"),
                )

    def _of_costs(self, model: ModelFile, costs: CostsFile) -> Iterator[Problem]:
        for name in costs.costs.keys() - model.sizes.keys() if not model.problems else ():
            yield Problem(f"the model has no module {name}; remove the table", (name, ""))
        per_node = costs.cluster.ranks_per_node
        if per_node not in (None, self.options.gpus_per_node):
            yield Problem(
                f"ranks_per_node is {per_node}, but --gpus-per-node {self.options.gpus_per_node}; "
                f"give the same",
                ("cluster", "ranks_per_node"),
            )

    def _of_options(self) -> Iterator[Problem]:
        options = self.options
        if options.reserve >= options.memory:
            yield Problem(
                f"--reserve {options.reserve} leaves nothing of --memory {options.memory}; lower it"
            )
        batch, samples = map(self.job.get, SIZES)
        if self.layout is None and batch and samples and batch % samples:
            yield Problem(
                f"global_batch_size {batch} is not a multiple of micro_batch_size {samples}; "
                f"change one of the two"
            )


def _whole_nodes(layout: LayoutFile, gpus_per_node: int) -> int:
    """GPUs of the nodes that a layout takes."""
    return -(-ranks_taken(pack(layout.modules).values()) // gpus_per_node) * gpus_per_node


def _cluster(options: argparse.Namespace, costs: CostsFile | None) -> Cluster:
    """The links between ranks: as measured, and as assumed where nothing was measured."""
    assumed = Cluster(
        ranks_per_node=options.gpus_per_node,
        node_latency_seconds=options.node_latency * MICRO,
        node_bytes_per_second=options.node_bandwidth * GIGA,
        network_latency_seconds=options.network_latency * MICRO,
        network_bytes_per_second=options.network_bandwidth * GIGA,
    )
    return evolve(assumed, **(costs.told.get(CLUSTER, {}) if costs else {}))


def _costs(
    sizes: Mapping[str, ModuleSizes],
    options: argparse.Namespace,
    cluster: Cluster,
    measured: Mapping[str, Mapping[str, Any]],
) -> Callable[[str, ModuleParallelism], ModuleCosts]:
    """What a module costs in a layout: as measured, and as estimated where nothing was measured."""
    accelerator = Accelerator(
        flops_per_second=options.flops * 1e12,
        memory_bytes_per_second=options.memory_bandwidth * GIGA,
    )
    width = sizes[LANGUAGE].hidden_size

    def of(name: str, parallelism: ModuleParallelism) -> ModuleCosts:
        estimated = estimated_costs(sizes[name], parallelism, width, accelerator, cluster)
        return evolve(estimated, **measured.get(name, {}))

    return of


def _assumptions(
    options: argparse.Namespace,
    costs: CostsFile | None,
    cluster: Cluster,
    names: Collection[str],
) -> Iterator[str]:
    """What the numbers rest on."""
    if costs and costs.costs:
        yield (
            f"{', '.join(costs.costs)} cost what {options.costs} says; what it leaves out is "
            f"estimated from sizes"
        )
    yield (
        f"a GPU achieves {options.flops:g} TFLOP/s and {options.memory_bandwidth:g} GB/s of memory"
    )
    yield (
        f"links: {cluster.node_bytes_per_second / GIGA:g} GB/s and "
        f"{cluster.node_latency_seconds / MICRO:g} us inside a node of {cluster.ranks_per_node}, "
        f"{cluster.network_bytes_per_second / GIGA:g} GB/s and "
        f"{cluster.network_latency_seconds / MICRO:g} us between nodes"
    )
    if len(names) > 2 and not options.layout:
        yield (
            "encoders share ranks with each other only where they share them with the language "
            "model; give other layouts to --layout"
        )
    yield from OF_COSTS
    yield f"{options.reserve} of each GPU's {options.memory} are for CUDA, NCCL and fragmentation"
    yield from OF_MEMORY
