"""Simulates a training step of a layout: Megatron's own order of events, durations from costs.

All data-parallel replicas of a stage do the same at the same time, so they are one here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    ModuleParallelism,
    default_topology,
    is_colocated,
    pack,
    ranks_taken,
    stages_behind,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import layout_problems, module_problems, raise_problems
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.durations import Durations
from megatron_mimo_coord.planning.events import Action, StageRanks, run
from megatron_mimo_coord.planning.schedule import ActionsAt, ends_of_link, order
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    EXCHANGE,
    FORWARD,
    OPTIMIZER,
    REDUCE,
    Timeline,
)

FREE = Cluster()


def simulate_step(
    modules: Mapping[str, ModuleParallelism],
    costs: Mapping[str, ModuleCosts],
    *,
    micro_batch_size: int,
    num_microbatches: int,
    cluster: Cluster = FREE,
    distributed_optimizer: bool = False,
) -> Timeline:
    """How long one training step of a layout takes, and what each stage does meanwhile.

    After its last backward each stage reduces its gradients. When all ranks of the job have done
    so, for which norms and finite checks over the whole model wait, each runs its optimizer.

    Args:
        modules: parallel sizes of each module, as ``MegatronMIMOInfra.build`` takes them.
        costs: what each module costs.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
        cluster: the links between ranks; messages are free by default.
        distributed_optimizer: whether data-parallel ranks share the optimizer's work.

    Raises:
        ValueError: the layout cannot run, the batch does not divide, or costs are missing; the
            message lists every problem.

    Example:
        >>> costs = ModuleCosts(forward_seconds_per_sample=1, backward_seconds_per_sample=2)
        >>> timeline = simulate_step(
        ...     {"language": ModuleParallelism(pipeline_model_parallel_size=2)},
        ...     {"language": costs},
        ...     micro_batch_size=2,
        ...     num_microbatches=3,
        ... )
        >>> timeline.seconds, timeline.stages["language", 0].busy
        (12.0, 0.75)
    """
    raise_problems("the layout cannot be simulated", module_problems(modules))
    grids = pack(modules)
    step = micro_batch_size * num_microbatches
    problems = [
        *layout_problems(grids, default_topology(grids), ranks_taken(grids.values())),
        *batch_problems(grids.values(), step, micro_batch_size, num_microbatches),
        *cost_problems(grids, costs),
    ]
    raise_problems("the layout cannot be simulated", problems)
    durations = Durations(modules, grids, costs, cluster, micro_batch_size, distributed_optimizer)
    return _Step(durations).run(num_microbatches)


def cost_problems(
    grids: Mapping[str, ModuleGrid], costs: Mapping[str, ModuleCosts]
) -> Iterator[str]:
    """What keeps costs from being those of a layout."""
    for name, grid in grids.items():
        if name not in costs:
            yield (
                f"there are no costs of module {name} (costs of: {', '.join(costs) or 'none'}); "
                f"give its ModuleCosts under that name"
            )
            continue
        try:
            costs[name].stage_share(grid.dim("pp"), 0)
        except ValueError as error:
            yield f"module {name}: {error}"


class _Step:
    """The stages of a layout that runs, and what each does."""

    def __init__(self, durations: Durations) -> None:
        self.durations, self.grids = durations, durations.grids
        self.is_colocated = is_colocated(self.grids.values())
        sharing: dict[range, list[str]] = {}  # in the order in which their forwards run
        for name in sorted(self.grids, key=lambda name: name == LANGUAGE):
            sharing.setdefault(self.grids[name].ranks, []).append(name)
        self.stages = [
            StageRanks(names, stage)
            for names in sharing.values()
            for stage in range(self.grids[names[0]].dim("pp"))
        ]
        self.messages: dict[tuple[str, int], list[ActionsAt]] = defaultdict(list)
        for name, grid in self.grids.items():
            for stage in range(grid.dim("pp")):
                self._link(name, stage)

    def run(self, num_microbatches: int) -> Timeline:
        """Simulate it."""
        durations = self.durations
        for ranks in self.stages:
            actions = self._actions(ranks)
            warm_up = stages_behind(self.grids, ranks.modules[0], ranks.stage)
            for event in order(num_microbatches, warm_up):
                ranks.actions += actions.get(event, ())
            ranks.actions += [
                Action(REDUCE, name, durations.reduction(name, ranks.stage))
                for name in ranks.modules
            ]
        run(self.stages)
        reduced = max(ranks.now for ranks in self.stages)
        for ranks in self.stages:
            ranks.wait_until(reduced)
            ranks.actions += [
                Action(OPTIMIZER, name, durations.optimizer(name, ranks.stage))
                for name in ranks.modules
            ]
        run(self.stages)
        seconds = max(ranks.now for ranks in self.stages)
        shares = {
            (name, ranks.stage): ranks.shares(name, seconds)
            for name in self.grids
            for ranks in self.stages
            if name in ranks.modules
        }
        return Timeline(
            seconds, shares, lambda: [s for ranks in self.stages for s in ranks.spans()]
        )

    def _link(self, module: str, stage: int) -> None:
        """Join a stage with the one behind it, if there is one."""
        durations, following = self.durations, (module, stage + 1)
        wanted = durations.has_backward(module, stage)
        if stage < self.grids[module].dim("pp") - 1:
            forward = durations.between_stages(module, stage)
            ends = ends_of_link(module, module, forward, forward if wanted else None)
        elif module == LANGUAGE or self.is_colocated:
            return
        else:
            following = (LANGUAGE, 0)
            forward = durations.over_bridge(module, forward=True)
            back = durations.over_bridge(module, forward=False) if wanted else None
            ends = ends_of_link(module, LANGUAGE, forward, back, bridge=module)
        self.messages[following].append(ends[1])
        self.messages[module, stage].append(ends[0])

    def _actions(self, ranks: StageRanks) -> dict[str, list[Action]]:
        """What the ranks of a stage do at each event of the schedule."""
        durations, stage = self.durations, ranks.stage
        forward = [Action(FORWARD, name, durations.forward(name, stage)) for name in ranks.modules]
        backward = [  # autograd goes back the way that forward came
            Action(BACKWARD, name, durations.backward(name, stage))
            for name in ranks.modules[:: -1 if self.is_colocated else 1]
            if durations.has_backward(name, stage)
        ]
        if self.is_colocated:
            exchanges = {
                name: Action(EXCHANGE, name, durations.exchange(name), bridge=name)
                for name in ranks.modules[:-1]
            }
            learning = [each.module for each in backward if each.module in exchanges]
            forward[-1:-1] = exchanges.values()
            backward[1:1] = [exchanges[name] for name in learning]
        actions = defaultdict(list, {FORWARD: forward, BACKWARD: backward})
        for name in ranks.modules:
            for messages in self.messages[name, stage]:
                for event, of_event in messages.items():
                    actions[event] += of_event
        return actions
