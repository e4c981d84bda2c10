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
    modules_by_stage,
    pack,
    ranks_taken,
    runs_encoders_first,
    sharing,
    stages_behind,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import (
    Problem,
    layout_problems,
    module_problems,
    raise_problems,
)
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.durations import Durations
from megatron_mimo_coord.planning.schedule import (
    Action,
    ActionsAt,
    Channel,
    StageRanks,
    actions_of_ends,
    channel,
    order,
    run,
)
from megatron_mimo_coord.planning.timeline import (
    BACKWARD,
    EXCHANGE,
    FORWARD,
    OPTIMIZER,
    REDUCE,
    Span,
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
    encoders_first: bool | None = None,
    encoder_microbatches: int | None = None,
) -> Timeline:
    """How long one training step of a layout takes, and what each stage does meanwhile.

    After its last backward each stage reduces its gradients. When all ranks of the job have done
    so, for which norms and finite checks over the whole model wait, each runs its optimizer.

    Args:
        modules: parallel sizes of each module, as ``MegatronMIMOInfra.build`` takes them.
        costs: what each module costs.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
        cluster: how fast messages are; by default they are free.
        distributed_optimizer: whether data-parallel ranks share the optimizer's work.
        encoders_first: of encoders on ranks of the language model, whether they run all
            microbatches before it, and their backward after it; else they run with each microbatch,
            as encoders inside the model's first stage do. None for what the coordinator does: the
            first where the language model has a pipeline.
        encoder_microbatches: of how many microbatches encoders that run first keep their
            activations; forwards of the others run again before their backwards. None for all.

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
        *cost_problems(modules, costs),
        *sharing_problems(grids, encoders_first),
    ]
    raise_problems("the layout cannot be simulated", problems)
    durations = Durations(modules, grids, costs, cluster, micro_batch_size, distributed_optimizer)
    first = runs_encoders_first(grids) if encoders_first is None else encoders_first
    return _Step(durations, num_microbatches, first, encoder_microbatches).run()


def cost_problems(
    modules: Mapping[str, ModuleParallelism], costs: Mapping[str, ModuleCosts]
) -> Iterator[str]:
    """What keeps costs from being those of a layout."""
    for name, module in modules.items():
        if name not in costs:
            yield (
                f"there are no costs of module {name} (costs of: {', '.join(costs) or 'none'}); "
                f"give its ModuleCosts under that name"
            )
            continue
        if module.has_unequal_stages and costs[name].layers_per_stage is None:
            yield (
                f"module {name} has stages of unequal numbers of layers, but its costs have no "
                f"layers_per_stage; give them"
            )
        try:
            costs[name].stage_share(module.pipeline_model_parallel_size, 0)
        except ValueError as error:
            yield f"module {name}: {error}"


def sharing_problems(
    grids: Mapping[str, ModuleGrid], encoders_first: bool | None
) -> Iterator[Problem]:
    """What keeps encoders from running where they are."""
    shared = sharing(grids) if LANGUAGE in grids else []
    apart = [name for name in grids if name not in (LANGUAGE, *shared)]
    if encoders_first and apart:
        yield Problem(
            f"{apart[0]} has ranks of its own: leave encoders_first out", (apart[0], "rank_offset")
        )
    for name in shared if encoders_first is False else ():
        language = grids[LANGUAGE]
        first = language.size // language.dim("pp")
        if grids[name].ranks.stop > language.rank_offset + first:
            yield Problem(
                f"{name} has ranks behind the {first} of the language model's first stage, which "
                f"it is to be inside: give it those, or leave encoders_first out",
                (name, "rank_offset"),
            )


class _Step:
    """The stages of a layout that runs, and what each does."""

    def __init__(
        self,
        durations: Durations,
        num_microbatches: int,
        encoders_first: bool,
        encoder_microbatches: int | None,
    ) -> None:
        self.durations, self.grids = durations, durations.grids
        self.num_microbatches, self.encoders_first = num_microbatches, encoders_first
        kept = num_microbatches if encoder_microbatches is None else encoder_microbatches
        self.num_repeated = num_microbatches - min(kept, num_microbatches)
        self.shared = sharing(self.grids)
        self.stages = [StageRanks(names, stage) for names, stage in modules_by_stage(self.grids)]
        self.messages: dict[tuple[str, int], list[ActionsAt]] = defaultdict(list)
        for name, grid in self.grids.items():
            for stage in range(grid.dim("pp")) if name not in self.shared else ():
                self._join(name, stage)

    def run(self) -> Timeline:
        """Simulate it."""
        if self.encoders_first:
            self._encode()
        for ranks in self.stages:
            actions = self._actions(ranks)
            warm_up = stages_behind(self.grids, ranks.modules[-1], ranks.stage)
            for event, microbatch in order(self.num_microbatches, warm_up):
                ranks.add(*actions.get(event, ()), microbatch=microbatch)
        if self.encoders_first:
            self._encode_backward()
        for ranks in self.stages:
            ranks.add(*self._reductions(ranks))
        run(self.stages)
        reduced = max(ranks.now for ranks in self.stages)
        for ranks in self.stages:
            ranks.wait_until(reduced)
            for name in ranks.modules:
                seconds = self.durations.optimizer(name, self._own(name, ranks))
                ranks.add(Action(OPTIMIZER, name, seconds))
        run(self.stages)
        seconds = max(ranks.now for ranks in self.stages)
        shares = {
            (name, ranks.stage): ranks.shares(name, seconds)
            for name in self.grids
            for ranks in self.stages
            if name in ranks.modules
        }
        return Timeline(seconds, shares, self._spans)

    def _spans(self) -> list[Span]:
        return [span for ranks in self.stages for span in ranks.spans()]

    def _own(self, name: str, ranks: StageRanks) -> int:
        """The stage of a module that some ranks run."""
        return 0 if name in self.shared else ranks.stage

    def _join(self, module: str, stage: int) -> None:
        """Join a stage with the one behind it, if there is one."""
        durations, following = self.durations, (module, stage + 1)
        wanted = durations.has_backward(module, stage)
        if stage < self.grids[module].dim("pp") - 1:
            forward = durations.between_stages(module, stage)
            ends = actions_of_ends(module, module, forward, forward if wanted else None)
        elif module == LANGUAGE:
            return
        else:
            following = (LANGUAGE, 0)
            forward = durations.over_bridge(module, forward=True)
            back = durations.over_bridge(module, forward=False) if wanted else None
            ends = actions_of_ends(module, LANGUAGE, forward, back, bridge=module)
        self.messages[following].append(ends[1])
        self.messages[module, stage].append(ends[0])

    def _channels(self, encoder: str, forward: bool) -> list[tuple[StageRanks, Channel]]:
        """Between an encoder's ranks on each stage and the language model's first, for a step."""
        seconds = self.num_microbatches * self.durations.over_bridge(encoder, forward=forward)
        return [(ranks, channel(seconds)) for ranks in self.stages if encoder in ranks.modules]

    def _encode(self) -> None:
        """Encoders run all microbatches; the pipeline's first stage then waits for their tokens."""
        times, arriving = self.num_microbatches, list[Action]()
        for name in self.shared:
            tokens = self._channels(name, forward=True)
            forward = Action(FORWARD, name, self.durations.forward(name, 0, times))
            for ranks, (sent, _) in tokens:
                for microbatch in range(times):
                    ranks.add(forward, microbatch=microbatch)
                ranks.add(Action(EXCHANGE, name, 0.0, (sent,), (), name), microbatch=times - 1)
            received = tuple(taken for _, (_, taken) in tokens)
            arriving.append(Action(EXCHANGE, name, 0.0, received, received, name))
        self.stages[0].add(*arriving, microbatch=times - 1)

    def _encode_backward(self) -> None:
        """They have their gradients from there, and run all microbatches again."""
        times, durations = self.num_microbatches, self.durations
        learning = [name for name in self.shared if durations.has_backward(name, 0)]
        gradients = {name: self._channels(name, forward=False) for name in learning}
        for name in learning:
            sent = tuple(sent for _, (sent, _) in gradients[name])
            leaving = Action(EXCHANGE, name, 0.0, sent, (), name)
            self.stages[0].add(leaving, microbatch=times - 1)
        for name in learning:
            forward, backward = (
                durations.forward(name, 0, times),
                durations.backward(name, 0, times),
            )
            for ranks, (_, taken) in gradients[name]:
                arriving = Action(EXCHANGE, name, 0.0, (taken,), (taken,), name)
                ranks.add(arriving, microbatch=times - 1)
                for microbatch in range(times):
                    repeated = forward if microbatch >= times - self.num_repeated else 0.0
                    ranks.add(Action(BACKWARD, name, repeated + backward), microbatch=microbatch)

    def _reductions(self, ranks: StageRanks) -> Iterator[Action]:
        """Of gradients; the language model's go on while encoders run backward behind it."""
        for name in reversed(ranks.modules) if self.encoders_first else ranks.modules:
            seconds = self.durations.reduction(name, self._own(name, ranks))
            if self.encoders_first and name == LANGUAGE:
                number, encoders = self.num_microbatches, ranks.modules[:-1]
                behind = sum(self.durations.backward(each, 0, number) for each in encoders)
                seconds = max(0.0, seconds - number * behind)
            yield Action(REDUCE, name, seconds)

    def _actions(self, ranks: StageRanks) -> dict[str, list[Action]]:
        """What the ranks of a stage do at each event of the schedule."""
        durations, stage = self.durations, ranks.stage
        names = [LANGUAGE] if self.encoders_first else ranks.modules
        is_shared = LANGUAGE in names
        forward = [
            Action(FORWARD, name, durations.forward(name, self._own(name, ranks))) for name in names
        ]
        backward = [  # autograd goes back the way that forward came
            Action(BACKWARD, name, durations.backward(name, self._own(name, ranks)))
            for name in names[:: -1 if is_shared else 1]
            if durations.has_backward(name, self._own(name, ranks))
        ]
        if is_shared:
            exchanges = {
                name: Action(EXCHANGE, name, durations.exchange(name), bridge=name)
                for name in names[:-1]
            }
            learning = [each.module for each in backward if each.module in exchanges]
            forward[-1:-1] = exchanges.values()
            backward[1:1] = [exchanges[name] for name in learning]
        actions = defaultdict(list, {FORWARD: forward, BACKWARD: backward})
        for name in names:
            for messages in self.messages[name, stage]:
                for event, of_event in messages.items():
                    actions[event] += of_event
        return actions
