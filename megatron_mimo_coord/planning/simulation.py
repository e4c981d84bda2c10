"""Simulates a training step of a layout: Megatron's own order of events, durations from costs.

All data-parallel replicas of a stage do the same at the same time, so one place in the pipeline
stands for all ranks that hold it.
"""

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
from megatron_mimo_coord.planning.events import Place, Task, run
from megatron_mimo_coord.planning.links import Link
from megatron_mimo_coord.planning.schedule import order
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
    return timeline_of(durations, num_microbatches)


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


def timeline_of(durations: Durations, num_microbatches: int) -> Timeline:
    """Simulate a step of a layout that runs."""
    links = {
        (name, stage): link
        for name, grid in durations.grids.items()
        for stage in range(grid.dim("pp"))
        if (link := _link(durations, name, stage)) is not None
    }
    places = [
        Place(names, stage)
        for names in _sharing_ranks(durations.grids)
        for stage in range(durations.grids[names[0]].dim("pp"))
    ]
    for place in places:
        tasks = _tasks(durations, place, links)
        warm_up = stages_behind(durations.grids, place.modules[0], place.stage)
        for event in order(num_microbatches, warm_up):
            place.tasks += tasks.get(event, ())
        place.tasks += [
            Task(REDUCE, name, durations.reduction(name, place.stage)) for name in place.modules
        ]
    run(places)
    reduced = max(place.now for place in places)
    for place in places:
        place.wait_until(reduced)
        place.tasks += [
            Task(OPTIMIZER, name, durations.optimizer(name, place.stage)) for name in place.modules
        ]
    run(places)
    seconds = max(place.now for place in places)
    stages = {
        (name, place.stage): place.shares(name, seconds)
        for name in durations.grids
        for place in places
        if name in place.modules
    }
    return Timeline(seconds, stages, lambda: [span for place in places for span in place.spans()])


def _sharing_ranks(grids: Mapping[str, ModuleGrid]) -> list[list[str]]:
    """Modules on the same ranks, in the order in which their forwards run."""
    names: dict[range, list[str]] = {}
    for name in sorted(grids, key=lambda name: name == LANGUAGE):
        names.setdefault(grids[name].ranks, []).append(name)
    return list(names.values())


def _link(durations: Durations, module: str, stage: int) -> Link | None:
    """What is behind a stage, if anything is."""
    grid = durations.grids[module]
    wanted = durations.has_backward(module, stage)
    if stage < grid.dim("pp") - 1:
        seconds = durations.between_stages(module, stage)
        return Link(seconds, seconds if wanted else None)
    if module == LANGUAGE or is_colocated(durations.grids.values()):
        return None
    back = durations.over_bridge(module, forward=False) if wanted else None
    return Link(durations.over_bridge(module, forward=True), back, bridge=module)


def _tasks(
    durations: Durations, place: Place, links: Mapping[tuple[str, int], Link]
) -> dict[str, list[Task]]:
    """What a place does at each event of the schedule."""
    stage = place.stage
    forward = [Task(FORWARD, name, durations.forward(name, stage)) for name in place.modules]
    backward = [  # autograd goes back the way that forward came
        Task(BACKWARD, name, durations.backward(name, stage))
        for name in place.modules[:: -1 if is_colocated(durations.grids.values()) else 1]
        if durations.has_backward(name, stage)
    ]
    if is_colocated(durations.grids.values()):
        encoders = place.modules[:-1]
        exchanges = {
            name: Task(EXCHANGE, name, durations.exchange(name), bridge=name) for name in encoders
        }
        forward[-1:-1] = [exchanges[name] for name in encoders]
        learning = [task.module for task in backward if task.module in exchanges]
        backward[1:1] = [exchanges[name] for name in learning]
    tasks = {FORWARD: forward, BACKWARD: backward}
    for name in place.modules:
        ends = [links[before].incoming(name) for before in _before(durations.grids, name, stage)]
        if (name, stage) in links:
            ends.append(links[name, stage].outgoing(name))
        for end in ends:
            for event, messages in end.items():
                tasks.setdefault(event, []).extend(messages)
    return tasks


def _before(grids: Mapping[str, ModuleGrid], module: str, stage: int) -> list[tuple[str, int]]:
    """The stages that a stage receives from, in the order in which it does."""
    if stage > 0:
        return [(module, stage - 1)]
    if module != LANGUAGE or is_colocated(grids.values()):
        return []
    return [(name, grid.dim("pp") - 1) for name, grid in grids.items() if name != LANGUAGE]
