"""A step's way from backward to the gradient of the one loss.

All ranks launch collectives in one order, whatever their data holds: the reductions that backward
finds ready, in the order of ``launch_order.py``; at finalize those that overlap and are missing, of
all modules, encoders before the language model; the sum of the token counts; then Megatron's own
finalize, module after module, which launches the reductions that do not overlap.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.checks.modules import remarks
from megatron_mimo_coord.gradients.launch_order import OrderedLaunches
from megatron_mimo_coord.gradients.loss_check import LossCheck
from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.gradients.num_tokens import NumTokens
from megatron_mimo_coord.gradients.optimizer_steps import OptimizerSteps
from megatron_mimo_coord.gradients.profiler_ranges import named_range
from megatron_mimo_coord.gradients.step_report import StepReport
from megatron_mimo_coord.gradients.step_state import StepState
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.auxiliary_losses import (
    make_room_for_metrics,
    recorded_depths,
    weigh_like_the_loss,
)
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.recompute import keep_gradients_of_recomputed_blocks
from megatron_mimo_coord.megatron.schedule import Schedule
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)

WHOLE_FINALIZE = "finalize_model_grads"
"""The range that :mod:`megatron_mimo_coord.gradients.profiler_ranges` shows all of it under."""


class Gradients:
    """The gradients of all modules on this rank: zeroed, accumulated and finalized.

    Args:
        job: the modules, their grids, and which of them are here.
        schedule: what calls us; its config's timers time each module.
        is_assigned, is_read_again: as a ``StepReport`` takes them.

    Attributes:
        modules: those on this rank, in the order in which they are finalized.
        has_mixtures: whether one of them adds auxiliary losses of experts.
        step: where a step stands.
        report: what the ranks tell each other before an optimizer's step.
        optimizer_steps: what is looked at before an optimizer uses the gradients.
    """

    def __init__(
        self,
        job: Job,
        schedule: Schedule,
        is_assigned: Callable[[str], bool],
        is_read_again: Callable[[], bool],
    ) -> None:
        changes = job.changes
        self._schedule = schedule
        order = sorted(job.ddps, key=LANGUAGE.__eq__)
        self.modules = {name: ModuleGradients(job, name) for name in order}
        _log_remarks(job)
        mixtures = [weigh_like_the_loss(ddp, job.per_token, changes) for ddp in job.ddps.values()]
        self.has_mixtures = any(mixtures)
        if sum(grid.size for grid in job.grids.values()) > dist.get_world_size():
            _share_tables_of_metrics(job)
        for ddp in job.ddps.values():
            keep_gradients_of_recomputed_blocks(ddp, changes)
        grads = [grads for module in self.modules.values() for grads in module.ddp.grads]
        self.step = StepState(job, grads, schedule)
        loss_check = LossCheck(job, schedule.scaled)
        self.report = StepReport(job, loss_check, is_assigned, is_read_again)
        self._num_tokens = NumTokens(job)
        self._launch_in_order(changes)
        for module in self.modules.values():
            module.ddp.route_zeroing(self._before_zeroing, self.step.zeroed, changes)
        modules = list(self.modules.values())
        self.optimizer_steps = OptimizerSteps(modules, self.step, self.report, changes)

    def _launch_in_order(self, changes: Changes) -> None:
        encoders = [module.ddp for name, module in self.modules.items() if name != LANGUAGE]
        language = [module.ddp for name, module in self.modules.items() if name == LANGUAGE]
        # One backward runs through all modules of a rank, the encoder that ran last first; on ranks
        # of encoders alone the schedule runs one for each, in order. The encoder that is reached
        # last is reduced first: it may meet ranks of which some have no image of the others, and
        # would launch their reductions after that, and some before.
        last_first = encoders if language else encoders[::-1]
        together = filter(None, (last_first, language))
        self._launches = [OrderedLaunches(ddps, changes) for ddps in together]

    def zero_grad_buffer(self) -> None:
        """Set the gradients of every module to zero, before a step.

        Raises:
            RuntimeError: they were accumulated, and nobody has finalized them; or what the report
                of the step before says.
        """
        for module in self.modules.values():
            module.ddp.ddp.zero_grad_buffer()

    def _before_zeroing(self) -> None:
        """Whoever zeroes the gradients of a module."""
        self.step.check_finalized(if_begun=False)
        self.report.begin()
        self._abandon()

    def _abandon(self) -> None:
        for each in self._launches:
            each.abandon()

    def begin_step(self) -> None:
        """The schedule begins: parameters are gathered, and nothing is left of a step before."""
        self.step.begin()
        self._abandon()
        self.start_param_sync()

    @contextmanager
    def no_sync(self, module_name: str | None = None) -> Iterator[None]:
        """Gradients of the microbatches inside only accumulate; of one module, or of all."""
        with ExitStack() as stack:
            for module in self.modules.values():
                if module_name in (None, module.name):
                    stack.enter_context(module.ddp.ddp.no_sync())
            yield

    def start_grad_sync(self, language_only: bool = False) -> None:
        """Launch the overlapped reductions of all modules.

        Args:
            language_only: not those of encoders, whose backward is yet to come.
        """
        for each in self._launches:
            each.finish_gathers()
        for each in self._launches[-1:] if language_only else self._launches:
            each.reduce()

    def start_param_sync(self) -> None:
        """Launch the overlapped gathering of parameters of all modules."""
        for each in self._launches:
            each.gather()

    def gather_params_now(self) -> None:
        """Have the parameters of all modules as the last update left them. Collective."""
        for each in self._launches:
            each.gather_now()

    def finalize(self, num_tokens: torch.Tensor | None, force_all_reduce: bool) -> None:
        """Make every module's gradients those of the one loss.

        Args:
            num_tokens: unmasked tokens that this rank counted, a tensor with one element.
            force_all_reduce: with the distributed optimizer, have every rank end with all
                gradients, and not only with its shards.

        Raises:
            ValueError: ``num_tokens`` is missing and the loss is per token, or the reverse.
            RuntimeError: called twice in a step, or outside of one, or for gradients that were not
                zeroed since they were last finalized.
        """
        self.step.check_finalize()
        self._num_tokens.check(num_tokens)
        with named_range(WHOLE_FINALIZE):
            self.start_grad_sync()
            counting = self._num_tokens.start(num_tokens)
            for module in self.modules.values():
                with self._timers_of_config(module):
                    module.finalize(force_all_reduce)
            if counting is not None:
                counting.wait()
                inverse_tokens = self._num_tokens.reciprocal()
                for module in self.modules.values():
                    module.divide(inverse_tokens, force_all_reduce)
            for each in self._launches:
                each.end(force_all_reduce)
        self.report.finalized(num_tokens)
        self.step.finalized()

    @contextmanager
    def _timers_of_config(self, module: ModuleGradients) -> Iterator[None]:
        """Have Megatron time a module with the timers of the schedule's config.

        Where timers start with a barrier, each rank must meet it as often as the others, however
        many modules it holds: those of the first one count.
        """
        attached, config = self._schedule.config, module.ddp.ddp.config
        if attached.timers is None:
            yield
            return
        meets = attached.barrier_with_L1_time and module is next(iter(self.modules.values()))
        with Changes() as changes:
            changes.set(config, "timers", attached.timers)
            changes.set(config, "barrier_with_L1_time", meets)
            yield


def _share_tables_of_metrics(job: Job) -> None:
    """Have all ranks record into tables of one length: Megatron sums those of a module's stages."""
    device = world_device()
    depths = torch.tensor(recorded_depths(job.ddps.values()), device=device)
    dist.all_reduce(depths, op=dist.ReduceOp.MAX)
    make_room_for_metrics(depths.tolist(), device)


def _log_remarks(job: Job) -> None:
    """What one rank of each module has to say of it."""
    for name, ddp in job.ddps.items():
        grid = job.grids[name]
        if job.rank == grid.rank_offset:
            for remark in remarks(ddp, grid, job.grids[LANGUAGE], job.per_token):
                logger.warning("%s", remark)
