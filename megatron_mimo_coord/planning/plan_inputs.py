"""What the planning command is given: files and options, and everything that is wrong with them."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from attrs import evolve

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism, pack, ranks_taken
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import Problem
from megatron_mimo_coord.layout.toml_file import LayoutFile
from megatron_mimo_coord.layout.toml_tables import TomlFile, as_problem
from megatron_mimo_coord.planning.choices import LEAST_TOKENS, Request
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.costs_file import CLUSTER, CostsFile
from megatron_mimo_coord.planning.estimates import ASSUMPTIONS as OF_COSTS
from megatron_mimo_coord.planning.estimates import (
    Accelerator,
    estimated_costs,
    recomputed_seconds,
    scaled,
)
from megatron_mimo_coord.planning.memory import ASSUMPTIONS as OF_MEMORY
from megatron_mimo_coord.planning.model_file import ModelFile
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import layers_numel
from megatron_mimo_coord.planning.simulation import sharing_problems
from megatron_mimo_coord.planning.size_problems import sharding_problems

MICRO, GIGA, TERA = 1e-6, 1e9, 1e12
OTHER_MODEL = 0.1
"""By how much more than this bytes of gradients differ only if the model does."""

SIZES = ("global_batch_size", "micro_batch_size")


class Inputs:
    """What a plan is made of: the files, as far as they can be read, and the options.

    Args:
        options: of the command line.

    Attributes:
        model, costs, layout: the files; None for one that was not given or cannot be read.
        sizes: of each module of the model.
        measured: the fields that the costs tell of each module, with their values.
        job: the sizes of the batch, as the options tell, else the layout.
        cluster: how fast messages are, as measured, and as assumed where nothing was measured.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.unread = options, list[Problem]()
        self.model: ModelFile | None = self._read(ModelFile, options.model)
        self.costs: CostsFile | None = self._read(CostsFile, options.costs)
        self.layout: LayoutFile | None = self._read(LayoutFile, options.layout)
        given = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
        self.job = {**(self.layout.job if self.layout else {}), **given}
        self.sizes = self.model.sizes if self.model else {}
        self.measured = dict(self.costs.told) if self.costs else {}
        assumed = Cluster(
            ranks_per_node=options.gpus_per_node,
            node_latency_seconds=options.node_latency * MICRO,
            node_bytes_per_second=options.node_bandwidth * GIGA,
            network_latency_seconds=options.network_latency * MICRO,
            network_bytes_per_second=options.network_bandwidth * GIGA,
        )
        self.cluster = evolve(assumed, **self.measured.pop(CLUSTER, {}))

    def _read(self, kind: type[TomlFile], path: Any) -> Any:
        try:
            return path and kind.read(path)
        except ValueError as error:
            self.unread.append(Problem(str(error)))
            return None

    def request(self, part: float = 1.0) -> Request:
        """What a layout is sought for, once there are no :meth:`problems`.

        Args:
            part: of the operations a second that options tell, which a GPU achieves.
        """
        options, per_node = self.options, self.options.gpus_per_node
        accelerator = Accelerator(
            flops_per_second=part * options.flops * TERA,
            memory_bytes_per_second=options.memory_bandwidth * GIGA,
        )
        return Request(
            sizes=self.sizes,
            gpus=options.gpus or -(-self.ranks // per_node) * per_node,
            gpus_per_node=per_node,
            global_batch_size=self.job["global_batch_size"],
            memory_bytes=options.memory - options.reserve,
            costs=partial(self._costs, accelerator),
            cluster=self.cluster,
            micro_batch_size=self.job.get("micro_batch_size"),
        )

    def _costs(
        self,
        accelerator: Accelerator,
        name: str,
        sizes: ModuleSizes,
        parallelism: ModuleParallelism,
    ) -> ModuleCosts:
        """What a module costs in a layout: as measured, else as estimated."""
        width, cluster = self.sizes[LANGUAGE].hidden_size, self.cluster
        estimated = estimated_costs(sizes, parallelism, width, accelerator, cluster)
        told = dict(self.measured.get(name, {}))
        if not told:
            return estimated
        if len(told.get("layers_per_stage", ())) != parallelism.pipeline_model_parallel_size:
            told.pop("layers_per_stage", None)  # of other stages
        if "imbalance" in told:  # as it was measured
            estimated = evolve(estimated, images_per_sample_deviation=0.0)
        plain = 2 * estimated.forward_seconds_per_sample
        plain += recomputed_seconds(self.sizes[name], accelerator)
        if plain:  # it was measured as the model file says
            told["backward_seconds_per_sample"] *= estimated.backward_seconds_per_sample / plain
        tp, cp, *_ = parallelism.shape
        if "tensor_parallel_efficiency" in told:  # it says what ranks wait for and repeat
            tp, told["measured_tensor_parallel_size"] = 1, 1
            told.setdefault("tensor_parallel_replicated_share", 0.0)
        if "context_parallel_efficiency" in told:
            cp, told["measured_context_parallel_size"] = 1, 1
        return scaled(evolve(estimated, **told), sizes, tp, cp, self.cluster)

    @property
    def ranks(self) -> int:
        """Ranks that the layout takes."""
        return ranks_taken(pack(self.layout.modules).values()) if self.layout else 0

    def problems(self) -> list[dict[str, Any]]:
        """All that is wrong, with its places in the files, in types that JSON knows."""
        told = list(map(as_problem, self.unread))
        if self.model:
            told += map(self.model.as_json, self.model.problems)
        if self.layout:
            told += map(self.layout.as_json, self._of_layout(self.layout))
        if self.costs:
            told += map(self.costs.as_json, [*self.costs.problems, *self._of_costs(self.costs)])
        return told + list(map(as_problem, self._of_options()))

    def _of_layout(self, layout: LayoutFile) -> Iterator[Problem]:
        yield from layout.problems_on(None)
        if layout.problems:
            return
        if self.options.inside_first_stage:
            yield from sharing_problems(pack(layout.modules), encoders_first=False)
        for name in SIZES:
            if name not in self.job:
                yield Problem(f"{name} is not known; give --{name.replace('_', '-')}")
        if all(name in self.job for name in SIZES):
            batch = (self.job[name] for name in SIZES)
            yield from batch_problems(pack(layout.modules).values(), *batch)
        if self.options.gpus and self.ranks > self.options.gpus:
            yield Problem(f"the layout takes {self.ranks} ranks, but --gpus is {self.options.gpus}")
        if self.model and not self.model.problems:
            sizes, modules = self.sizes, layout.modules
            for name in sizes.keys() - modules.keys():
                yield Problem(f"the layout has no module {name} of the model: add [{name}]")
            for name in modules.keys() - sizes.keys():
                yield Problem(f"the model has no module {name}; remove it", (name, ""))
            for name in sizes.keys() & modules.keys():
                yield from sharding_problems(name, sizes[name], modules[name])

    def _of_costs(self, costs: CostsFile) -> Iterator[Problem]:
        if costs.problems or not self.model:
            return
        for name in self.measured.keys() - self.sizes.keys() if not self.model.problems else ():
            yield Problem(f"the model has no module {name}; remove the table", (name, ""))
        per_node, given = self.cluster.ranks_per_node, self.options.gpus_per_node
        if per_node != given:
            yield Problem(
                f"ranks_per_node is {per_node}, but --gpus-per-node {given}; give the same",
                (CLUSTER, "ranks_per_node"),
            )

    def _of_options(self) -> Iterator[Problem]:
        reserve, memory = self.options.reserve, self.options.memory
        if reserve >= memory:
            yield Problem(
                f"--reserve {reserve / GIGA:g} GB leaves nothing of --memory {memory / GIGA:g} GB; "
                f"lower it"
            )
        if self.layout is None and all(name in self.job for name in SIZES):
            yield from batch_problems((), *(self.job[name] for name in SIZES))


def assumptions(inputs: Inputs) -> Iterator[str]:
    """What the numbers rest on, for a user to read."""
    options, cluster, request = inputs.options, inputs.cluster, inputs.request()
    for name, told in inputs.measured.items():
        yield (
            f"{name} costs what {options.costs} says, measured at TP "
            f"{told.get('measured_tensor_parallel_size', 1)} and CP "
            f"{told.get('measured_context_parallel_size', 1)}: what ranks of others wait for is "
            f"estimated from the links, and what it leaves out from sizes"
        )
        if "layers_per_stage" in told:
            yield (
                f"{name} has stages as {options.costs} says where its PP is "
                f"{len(told['layers_per_stage'])}, and as estimated from sizes elsewhere"
            )
        sizes = request.sizes[name]
        estimated = request.costs(name, sizes, ModuleParallelism()).gradient_bytes
        whole, width = range(sizes.num_layers), request.sizes[LANGUAGE].hidden_size
        number = layers_numel(sizes, whole, width)
        expected = number * (4 if sizes.grad_reduce_in_fp32 else sizes.bytes_per_number)
        if estimated and abs(estimated / expected - 1) > OTHER_MODEL:
            yield (
                f"extrapolated: {options.costs} has {estimated / GIGA:.3g} GB of gradients for "
                f"{name}, the model file {expected / GIGA:.3g} GB: it was measured on another model"
            )
    bandwidth = options.memory_bandwidth
    yield f"a GPU achieves {options.flops:g} TFLOP/s and {bandwidth:g} GB/s of memory"
    yield (
        f"links: {cluster.node_bytes_per_second / GIGA:g} GB/s and "
        f"{cluster.node_latency_seconds / MICRO:g} us inside a node of {cluster.ranks_per_node}, "
        f"{cluster.network_bytes_per_second / GIGA:g} GB/s and "
        f"{cluster.network_latency_seconds / MICRO:g} us between nodes"
    )
    if not options.layout:
        yield (
            "of layouts that differ in encoders alone and take as long to 1 %, on as many nodes, "
            "the fastest is listed"
        )
        if request.sizes[LANGUAGE].sequence >= 2 * LEAST_TOKENS:
            yield (
                f"the language model's CP is 1, 2, 4, ... as long as a rank keeps {LEAST_TOKENS:,} "
                f"tokens of a sample; give others to --layout"
            )
        if len(request.encoders) > 1:
            yield (
                "encoders share ranks with each other only where they share them with the language "
                "model; give other layouts to --layout"
            )
    yield from OF_COSTS
    reserve, memory = options.reserve / GIGA, options.memory / GIGA
    yield f"{reserve:g} GB of each GPU's {memory:g} GB are for CUDA, NCCL and fragmentation"
    yield from OF_MEMORY
