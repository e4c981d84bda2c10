"""What a coordinator has of gradients, put together once."""

import logging
from collections.abc import Callable

from attrs import frozen

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.checks.modules import remarks
from megatron_mimo_coord.gradients.finalize import GradientFinalizer
from megatron_mimo_coord.gradients.loss_check import LossCheck
from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.gradients.num_tokens import NumTokens, holds_a_distinct_count
from megatron_mimo_coord.gradients.optimizer_steps import OptimizerSteps
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.auxiliary_losses import make_room_for_metrics, weigh_like_the_loss
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp
from megatron_mimo_coord.megatron.recompute import keep_gradients_of_recomputed_blocks
from megatron_mimo_coord.megatron.schedule import Schedule
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


@frozen
class Gradients:
    """Of a model, on this rank.

    Args:
        modules: the modules on this rank.
        step: where a step stands.
        finalizer: from zeroing to the gradient of the one loss.
        report: what the ranks tell each other before an optimizer's step.
        optimizer_steps: what is looked at before an optimizer uses them.
        has_mixtures: whether a module here adds auxiliary losses of experts.
    """

    modules: dict[str, ModuleGradients]
    step: StepState
    finalizer: GradientFinalizer
    report: StepReport
    optimizer_steps: OptimizerSteps
    has_mixtures: bool

    @classmethod
    def of(
        cls,
        job: Job,
        schedule: Schedule,
        is_assigned: Callable[[str], bool],
        is_read_again: Callable[[], bool],
        changes: Changes,
    ) -> "Gradients":
        """Take charge of a job's gradients.

        Args:
            job: the modules, their grids, and which of them are here.
            schedule: what calls us.
            is_assigned: whether the images that an encoder is given now were dealt out by cost.
            is_read_again: whether a microbatch that the model is given now will come once more.
            changes: where is recorded what is changed in the model and its DDPs.
        """
        modules = {name: _collect(job, name, changes) for name in job.ddps}
        mixtures = [weigh_like_the_loss(ddp, job.per_token, changes) for ddp in job.ddps.values()]
        make_room_for_metrics(job.ddps.values())
        for module in job.ddps.values():
            keep_gradients_of_recomputed_blocks(module, changes)
        ddps = [module.ddp for module in modules.values()]
        step = StepState([grads for ddp in ddps for grads in ddp.grads], schedule)
        step.watch(job.model, changes)
        language = job.grids[LANGUAGE]
        loss_check = None
        if holds_a_distinct_count(language, job.rank) and (job.per_token or language.dim("cp") > 1):
            loss_check = LossCheck(language, job.per_token, schedule.scaled, job.model, changes)
        report = StepReport(
            {name: grid.data_parallel_size for name, grid in job.grids.items()},
            {name: job.grids[name].coordinate(job.rank, "dp") for name in job.ddps},
            loss_check,
        )
        report.watch(job.model, is_assigned, is_read_again, changes)
        num_tokens = NumTokens(language, job.rank, job.per_token, world_device())
        finalizer = GradientFinalizer(
            list(modules.values()), num_tokens, step, report, schedule, changes
        )
        optimizer_steps = OptimizerSteps(list(modules.values()), step, report, changes)
        return cls(modules, step, finalizer, report, optimizer_steps, any(mixtures))

    @property
    def ddps(self) -> dict[str, ModuleDdp]:
        """The DDP of each module on this rank."""
        return {name: module.ddp for name, module in self.modules.items()}


def _collect(job: Job, name: str, changes: Changes) -> ModuleGradients:
    pg_collection = job.infra.pg_collections[name]
    assert pg_collection is not None, "module_problems_here has seen to it"
    grid = job.grids[name]
    if job.rank == grid.rank_offset:
        for remark in remarks(job.ddps[name], grid, job.grids[LANGUAGE], job.per_token):
            logger.warning("%s", remark)
    factor = job.gradient_scaling_factors[name]
    return ModuleGradients(name, ModuleDdp(job.ddps[name]), pg_collection, factor, changes)
