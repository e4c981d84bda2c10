"""The one object that a MIMO trainer holds, and whose methods the Megatron schedule calls."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, Self

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.communicator import PipelineCommunicator, build_communicator
from megatron_mimo_coord.bridges.empty_batches import run_with_replicas
from megatron_mimo_coord.bridges.encoders_first import EncodersFirst
from megatron_mimo_coord.bridges.even_texts import make_texts_even
from megatron_mimo_coord.bridges.text_tokens import TextTokens
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.finalize import Gradients
from megatron_mimo_coord.gradients.module import ModuleGradients
from megatron_mimo_coord.gradients.norms import grad_norms, num_parameters
from megatron_mimo_coord.gradients.num_tokens import holds_a_distinct_count
from megatron_mimo_coord.infra import (
    GridsAndGroups,
    Infra,
    schedule_pg_collection,
    validate_data_loader_contract,
)
from megatron_mimo_coord.layout import LANGUAGE, is_colocated, is_count, runs_encoders_first
from megatron_mimo_coord.layout.batch import data_parallel_slice
from megatron_mimo_coord.layout.description import describe, summarize
from megatron_mimo_coord.layout.image_assignment import (
    ImageAssignment,
    assign_images,
    encoder_grid,
)
from megatron_mimo_coord.megatron.auxiliary_losses import SCALE_HOOK, scale_of
from megatron_mimo_coord.megatron.forwards import without_empty_inputs
from megatron_mimo_coord.megatron.module_random_states import draw_by_module
from megatron_mimo_coord.megatron.names import told_of_missing_names
from megatron_mimo_coord.megatron.random_states import drop_whole_embeddings_alike
from megatron_mimo_coord.megatron.rotary_positions import cut_rotary_positions
from megatron_mimo_coord.megatron.schedule import (
    Hooks,
    Schedule,
    check_sequence_lengths,
    hand_over_no_views,
    run_pipeline,
)
from megatron_mimo_coord.megatron.turns import Turns
from megatron_mimo_coord.metrics.losses import reduce_losses
from megatron_mimo_coord.metrics.span_recorder import Place
from megatron_mimo_coord.metrics.step_observer import StepObserver
from megatron_mimo_coord.metrics.timeline_recording import TimelineRecording, steps_to_record
from megatron_mimo_coord.training.checkpoint_load import LoadedCheckpoint
from megatron_mimo_coord.training.checkpoint_save import CheckpointSave
from megatron_mimo_coord.training.checkpoints import Checkpoints
from megatron_mimo_coord.training.encoder_ahead import EncoderAhead
from megatron_mimo_coord.training.evaluation import evaluation_mode
from megatron_mimo_coord.training.optimizer import build_optimizer
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


_TELL_ALL_RANKS = ("save_checkpoint", "load_checkpoint", "load_weights")
"""Methods that begin with the outcome of the last save, on all ranks at once."""


def _while_open[**Params, Result](
    method: Callable[Concatenate["MultiModuleCoordinator", Params], Result],
) -> Callable[Concatenate["MultiModuleCoordinator", Params], Result]:
    """A method that a closed coordinator refuses, and that says if Megatron-Core has changed.

    It also says that a checkpoint could not be written in the background, on ranks that know.
    """

    @wraps(method)
    def checked(
        self: "MultiModuleCoordinator", /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        self._changes.check_open()
        if method.__name__ not in _TELL_ALL_RANKS:
            self._checkpoints.tell_failure()
        with told_of_missing_names():
            return method(self, *args, **kwargs)

    return checked


class MultiModuleCoordinator:
    """Holds, on every rank, which modules live there and how their gradients become the loss's.

    Build it once, on every rank, when the submodules are wrapped in DDP; then call :meth:`attach`.
    The ranks compare what they were given, and replicas their weights, with small collectives.

    Args:
        infra: grids and process groups: a ``MegatronMIMOInfra``, this package's or
            Megatron-Bridge's, or any object with ``module_to_grid_map``, ``pg_collections`` and
            ``topology``; or one with ``grids`` and ``module_pgs``, as Megatron-LM's
            ``HeteroTopology``.
        model: the ``MimoModel``, its submodules wrapped in Megatron's ``DistributedDataParallel``;
            ``Float16Module`` may be around it, around its submodules, or both.

    Raises:
        ValueError: the layout cannot run, the model lacks a module or its DDP, or ranks disagree;
            raised on every rank alike, with every problem found.
        RuntimeError: ``model`` holds no ``MimoModel``; on the ranks where it does, the others
            raise a ValueError that says so.

    Example:
        >>> coordinator = MultiModuleCoordinator(infra, model)
        >>> coordinator.attach(model.config)
        >>> print(coordinator.describe(micro_batch_size=8))
        1 rank, modules colocated; 1 pipeline stage; 8 samples at a time; mean loss
        module    ranks  TP  CP  PP  DP  samples/rank  gradient x  bridge
        vision    0      1   1   1   1   8             1           one to one 1:1
        language  0      1   1   1   1   8             1
    """

    @told_of_missing_names()
    def __init__(self, infra: Infra | GridsAndGroups, model: torch.nn.Module) -> None:
        self._job = Job.agree(infra, model)
        self._changes = self._job.changes
        with ExitStack() as on_error:
            on_error.callback(self._changes.close)
            self._take_charge(model)
            on_error.pop_all()

    def _take_charge(self, model: torch.nn.Module) -> None:
        job, changes = self._job, self._changes
        changes.take(job.model, *job.ddps.values())
        self._grids = job.grids
        self._schedule_pg_collection = schedule_pg_collection(job.infra, job.ddps)
        self._communicators: list[PipelineCommunicator] = []
        self._optimizer: Any = None
        self._to_finalize: tuple[torch.Tensor | None, bool] | None = None
        hand_over_no_views(job.model, changes)
        self._schedule = Schedule(model, job.model, changes)
        self._turns = turns = Turns(job.model, runs_encoders_first(job.grids))
        self._assignments = assignments = PendingAssignments()
        # Who looks at what a forward is given, in this order:
        job.forwards.watch(without_empty_inputs)
        job.forwards.watch(assignments.begin_forward)
        job.forwards.watch(turns.check)
        self._gradients = gradients = Gradients(
            job, self._schedule, assignments.is_assigned, is_read_again=lambda: turns.encoders
        )
        misfits = gradients.report.misfits
        make_texts_even(job, assignments, misfits)
        if LANGUAGE in job.ddps:
            cut_rotary_positions(job.model, job.groups[LANGUAGE].cp, job.forwards, changes)
        self._texts = TextTokens(job, assignments, misfits)
        run_with_replicas(job, lambda: not turns.language, misfits)
        self._encoders_first = EncodersFirst(job, turns, assignments, gradients.no_sync)
        self._modules, self._step = gradients.modules, gradients.step
        self._ahead = EncoderAhead(job.ddps, assignments, gradients.report.texts)
        self._checkpoints = Checkpoints(
            job, gradients.gather_params_now, gradients.optimizer_steps, self._ahead.problems
        )
        for module in job.ddps.values():
            drop_whole_embeddings_alike(module, changes)
        draw_by_module(job.ddps, job.infra.module_to_grid_map, changes)
        if job.rank == 0:
            logger.info("%s", self.describe())

    def close(self) -> None:
        """Undo all that the coordinator has changed in the model, its DDPs, configs and optimizers.

        They train on as if no coordinator had been. A later coordinator of the same model does it
        by itself, and so does the end of a ``with``. Not collective; a second time does nothing.
        Afterwards the coordinator's methods raise a RuntimeError, and so does the first backward
        with a communicator that it built. A checkpoint that is being written in the background is
        finished; a timeline that is being recorded is not written, and a warning says so.

        Example:
            >>> with MultiModuleCoordinator(infra, model) as coordinator:
            ...     coordinator.attach(model.config)
            >>> model.config.finalize_model_grads_func is None
            True
        """
        self._changes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what lives on this rank -------------------------------------------------------------------

    @property
    def module_to_grid_tuples(self) -> tuple[tuple[DistributedDataParallel, HyperCommGrid], ...]:
        """(module, grid) of every module on this rank; the module is its DDP."""
        grids = self._job.infra.module_to_grid_map
        return tuple((ddp, grids[name]) for name, ddp in self._job.ddps.items())

    @property
    def active_module_pg(self) -> tuple[str, ProcessGroupCollection]:
        """(name, process groups) of the one module on this rank.

        Raises:
            RuntimeError: several modules live on this rank; use ``schedule_pg_collection``.
        """
        module = self._only_module("active_module_pg", "schedule_pg_collection")
        return module.name, module.pg_collection

    @property
    def schedule_pg_collection(self) -> MultiModuleProcessGroupCollection:
        """Process groups of this rank's modules, as the schedule's ``pg_collection``."""
        return self._schedule_pg_collection

    @property
    def gradient_scaling_factors(self) -> Mapping[str, float]:
        """For each module on this rank, the factor from DDP's result to the gradient of the loss.

        Of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`; with a per-token loss without
        the 1/N, which only each step knows. It is applied already: nothing is left to multiply.

        Example:
            >>> coordinator.gradient_scaling_factors["vision"]
            1.0
        """
        factors = self._job.gradient_scaling_factors
        return MappingProxyType({name: factors[name] for name in self._modules})

    @property
    def gradient_scaling_factor(self) -> float:
        """The factor of the one module on this rank.

        Raises:
            RuntimeError: several modules live on this rank; use ``gradient_scaling_factors``.
        """
        module = self._only_module("gradient_scaling_factor", "gradient_scaling_factors")
        return self._job.gradient_scaling_factors[module.name]

    # -- what the trainer calls --------------------------------------------------------------------

    @_while_open
    def attach(self, config: ModelParallelConfig, optimizer: Any = None) -> None:
        """Hand this coordinator's methods to the schedule, through the model's config.

        Sets ``no_sync_func`` and ``finalize_model_grads_func``; with an optimizer
        ``grad_scale_func``; where a module's DDP has ``overlap_param_gather`` and
        ``align_param_gather`` also ``param_sync_func``. With ``overlap_grad_reduce``
        ``grad_sync_func`` must be None. Attaching again is fine: the last time counts. A
        coordinator that was attached to the same config before is closed.

        Args:
            config: the language model's config, ``get_model_config(model)``.
            optimizer: Megatron's, whose ``scale_loss`` scales the loss. A ``MimoOptimizer`` skips
                steps in which a module's gradients are not finite, on all ranks alike.

        Raises:
            ValueError: someone else has set one of these hooks, or the modules are on disjoint
                ranks and ``variable_seq_lengths`` is off. Nothing is set then.

        Example:
            >>> coordinator.attach(model.config)
            >>> model.config.finalize_model_grads_func == coordinator.finalize_model_grads
            True
        """
        if not is_colocated(self._grids.values()):
            check_sequence_lengths(config)
        self._schedule.attach(config, self._hooks(config, optimizer))
        self._step.attached()
        self._optimizer = optimizer
        if optimizer is not None:
            self._gradients.optimizer_steps.watch(optimizer)

    def _hooks(self, config: ModelParallelConfig, optimizer: Any) -> Hooks:
        """What the schedule is to call."""
        hooks: dict[str, Callable[..., Any] | None] = {
            "no_sync_func": self.no_sync,
            "finalize_model_grads_func": self.finalize_model_grads,
        }
        if optimizer is not None:
            hooks["grad_scale_func"] = optimizer.scale_loss
        if self._gradients.has_mixtures:
            is_scaled = self._job.per_token or LANGUAGE in self._modules
            scale = scale_of(config, 1 if is_scaled else self._grids[LANGUAGE].dim("cp"))
            if scale is not None:
                hooks[SCALE_HOOK] = scale
        settings = [module.ddp.settings for module in self._modules.values()]
        if any(each.overlap_grad_reduce for each in settings):
            hooks["grad_sync_func"] = None  # with one, most stages would reduce after backward
        if any(each.overlap_param_gather and each.align_param_gather for each in settings):
            hooks["param_sync_func"] = self.start_param_sync
        return hooks

    @_while_open
    def build_optimizer(
        self,
        optimizer_config: OptimizerConfig,
        config_overrides: Mapping[str | ParamKey, ParamGroupOverride] | None = None,
    ) -> MimoOptimizer:
        """Make Megatron's ``MimoOptimizer``, also where ranks hold different numbers of modules.

        Collective: every rank calls it, once, before :meth:`attach`.

        Args:
            optimizer_config: settings of every module's optimizer.
            config_overrides: other settings of a module, by its name, or of the parameters of all
                modules that one of Megatron's ``ParamKey`` matches: ``max_lr``, ``min_lr``,
                ``start_wd``, ``end_wd``, ``wd_mult``. Rates begin at ``max_lr``; the rest is read
                by Megatron's ``OptimizerParamScheduler``. Megatron's own exemptions from weight
                decay stay.

        Raises:
            ValueError: ranks were given different settings, or they do not fit a module's DDP, or
                each other; on every rank alike.

        Example:
            >>> from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey
            >>> optimizer = coordinator.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3))
            >>> coordinator.attach(model.config, optimizer)
            >>> optimizer.step()
            (True, 0.0, None)
        """
        optimizer = build_optimizer(self._job, optimizer_config, config_overrides or {})
        self._gradients.optimizer_steps.watch(optimizer)
        return optimizer

    @_while_open
    def build_pipeline_communicator(self, config: ModelParallelConfig) -> PipelineCommunicator:
        """Make the schedule's ``p2p_communicator``, once, outside the loop. Collective.

        Samples may have no, one or many images, and encoders any DP that divides or is a multiple
        of the language model's; colocated modules run with it too, and send nothing. No rank waits
        for its device, but for one thing: without :meth:`assign_images` an encoder that feeds
        several language ranks, or that was fed no image, reads its samples' numbers of tokens from
        ``input_ids`` once a microbatch.

        Args:
            config: the language model's config, with ``pipeline_dtype``.

        Raises:
            ValueError: ``variable_seq_lengths`` is off, which the schedule of several modules wants
                on, or ranks send to each other and ``pipeline_dtype`` is not set.
        """
        check_sequence_lengths(config)
        self._texts.may_vary = True
        communicator = build_communicator(self._job, config, self._assignments, self._texts)
        communicator.after_backward = self._after_backward
        communicator.before_forward = self._turns.check
        self._communicators.append(communicator)
        return communicator

    @_while_open
    def zero_grad_buffer(self) -> None:
        """Set the gradients of every module on this rank to zero, before a step.

        Where no ``MimoOptimizer`` has used those of the step before, it first tells what was wrong
        with that step: collective, and it waits for the device.

        Raises:
            RuntimeError: gradients were accumulated, and ``finalize_model_grads`` did not run; or
                what was wrong with the step before, on every rank alike.
        """
        self._gradients.zero_grad_buffer()

    def data_parallel_slice(self, micro_batch_size: int, module_name: str | None = None) -> slice:
        """Samples of a microbatch that this rank's module reads.

        A rank of the language model passes its slice of ``input_ids`` to the model; a rank of
        encoders alone that of its encoder with the smallest DP, out of which the rows of the others
        are cut. It may pass the same where images are assigned; nothing is read of it then.

        Args:
            micro_batch_size: samples in a microbatch over all ranks.
            module_name: the module; may be left out where only one lives on this rank.

        Raises:
            ValueError: the module is not on this rank, or the microbatch does not divide by its DP.
            RuntimeError: several modules live on this rank and none is named.

        Example:
            >>> images = torch.zeros(8, 3)
            >>> images[coordinator.data_parallel_slice(8, "vision")].shape
            torch.Size([8, 3])
        """
        if module_name is None:
            module_name = self._only_module("data_parallel_slice", "the module_name argument").name
        if module_name not in self._grids:
            raise ValueError(
                f"there is no module {module_name!r}; the modules are {', '.join(self._grids)}"
            )
        samples = data_parallel_slice(micro_batch_size, self._grids[module_name], self._job.rank)
        self._texts.micro_batch_size = micro_batch_size
        return samples

    @_while_open
    def assign_images(
        self,
        module_name: str,
        tokens: Sequence[Sequence[int]],
        costs: Sequence[Sequence[float]] | None = None,
        sample_ids: Sequence[Any] | None = None,
    ) -> ImageAssignment:
        """Deal a microbatch's images out to an encoder's data-parallel ranks by cost.

        Call it once a microbatch, in order, before the forward, with the same numbers on every
        rank that holds the module; on the language model's ranks it has the bridge check that their
        samples are the encoder's. Feed the encoder the images of ``assignment.local``: the
        communicator of :meth:`build_pipeline_communicator` brings their tokens to the ranks that
        read their samples. A microbatch without a call is dealt out in consecutive slices; where
        encoders run before the language model, a step as a whole is dealt out evenly. What an
        :meth:`evaluation` runs is assigned inside it. Plain arithmetic, no communication.

        Args:
            module_name: the encoder.
            tokens: for every sample of the microbatch, all ranks' samples in order, the number of
                tokens of each of its images.
            costs: what encoding each image costs in any unit, nested alike; ``tokens`` if left out.
            sample_ids: a number or a string for each sample: ranks whose ids differ find out.

        Raises:
            ValueError: there is no such encoder, a number is not one, the nesting differs, or the
                samples do not divide by the encoder's DP.
            RuntimeError: the microbatches of thousands of calls never ran.

        Example:
            >>> images = [["a dog", "a cat"], ["a bird"]]
            >>> assignment = coordinator.assign_images("vision", [[16, 16], [64]])
            >>> [images[sample][image] for sample, image in assignment.local]
            ['a dog', 'a cat', 'a bird']
            >>> assignment.loads, assignment.imbalance
            ((96,), 1.0)
        """
        before = self._assignments.made_before(module_name)
        if before is not None:
            return before
        grid = encoder_grid(self._grids, module_name)
        of_step = self._turns.are_taken or runs_encoders_first(self._grids)
        carried = self._assignments.carried(module_name) if of_step else None
        assignment = assign_images(grid, self._job.rank, tokens, costs, sample_ids, carried)
        self._assignments.put(assignment)
        return assignment

    def validate_data_loader_contract(
        self, global_batch_size: int, micro_batch_size: int, num_microbatches: int
    ) -> None:
        """:func:`megatron_mimo_coord.validate_data_loader_contract` for this layout."""
        validate_data_loader_contract(
            self._job.infra, global_batch_size, micro_batch_size, num_microbatches
        )

    @_while_open
    def reduce_losses(self, losses: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average what the schedule returned, to the same dict on every rank. Collective.

        One collective of numbers; the dict waits for the device when a rank first looks at it.

        Args:
            losses: the schedule's return value: a map a microbatch on the last stage, empty
                elsewhere. A value is a number, averaged over microbatches and replicas, or a pair
                (sum, weight), of which sum of sums / sum of weights is reported. Up to 64 names.

        Raises:
            ValueError: a value is neither a number nor a pair, or ranks report different names: at
                once on the rank that reports it, elsewhere when the dict is looked at.
            RuntimeError: gradients were accumulated, and ``finalize_model_grads`` did not run.

        Example:
            >>> coordinator.reduce_losses([{"loss": (6.0, 2.0)}, {"loss": (6.0, 4.0)}])
            {'loss': 2.0}
        """
        self._step.check_finalized(if_begun=False)
        language, rank = self._grids[LANGUAGE], self._job.rank
        return reduce_losses(
            losses,
            reports=language.is_on_last_stage(rank),
            counts=holds_a_distinct_count(language, rank),
        )

    @_while_open
    def grad_norms(self) -> dict[str, torch.Tensor]:
        """L2 norm of each module's gradients, the same on every rank. Collective.

        Call it between the schedule and ``optimizer.step()``, which clips. Nothing waits for the
        device until a norm is read.

        Returns:
            For each module of the job, a tensor without dims on this rank's device, in fp32. The
            loss scale is taken out.

        Raises:
            RuntimeError: ``finalize_model_grads`` did not run since gradients were accumulated, or
                ``optimizer.step()`` has clipped them.

        Example:
            >>> norms = coordinator.grad_norms()
            >>> {name: float(norm) for name, norm in norms.items()}
            {'vision': 0.0, 'language': 0.0}
        """
        self._step.check_norms()
        scale = self._schedule.scaled(torch.ones((), device=world_device()))
        return grad_norms(self._grids, self._modules, scale)

    @_while_open
    def num_trainable_parameters(self) -> dict[str, int]:
        """Parameters of each module that have a gradient, over all ranks, each counted once.

        Collective, the same on every rank; ask once, outside the loop.
        """
        return num_parameters(self._grids, self._modules)

    @_while_open
    def record_timeline(
        self,
        path: str | Path,
        steps: int | range = 3,
        *,
        gpus_per_node: int | None = None,
        flops_per_sample: float | None = None,
    ) -> TimelineRecording:
        """Record what every rank does in a few steps. Call it on every rank, between two steps.

        A step begins where gradients are zeroed, whoever calls ``zero_grad_buffer``, and ends with
        the attached optimizer's ``step``. At the end of the last one rank 0 writes the trace and,
        beside it, ``costs.toml``: what each module was measured to cost, for ``mimo-plan --costs``.
        A recording that saw too few steps logs that at the end. No host waits inside a step.

        Args:
            path: where rank 0 writes Chrome Trace JSON, which Perfetto opens: a process for each
                module, a thread for each rank.
            steps: how many of the next steps, or a range of them counted from now.
            gpus_per_node: GPUs of a node, idle ones included; by default those that PyTorch sees.
            flops_per_sample: floating-point operations of the model for a sample, forward and
                backward, for model FLOP/s.

        Returns:
            The recording, whose ``summary`` rank 0 can print once the last step is over.

        Raises:
            ValueError: ``steps`` is neither a number nor a range.
        """
        job = self._job
        ddps = {name: module.ddp for name, module in self._modules.items()}
        place = Place.of(job.rank, job.grids, list(ddps))
        recording = TimelineRecording(
            steps_to_record(steps),
            self._step,
            StepObserver(place, job.model, ddps, self._communicators, self._optimizer),
            has_optimizer=self._optimizer is not None,
            grids=job.grids,
            path=Path(path),
            gpus_per_node=gpus_per_node,
            flops_per_sample=flops_per_sample,
        )
        self._changes.on_close(recording.give_up)
        return recording

    @_while_open
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Between any two steps, run the schedule with ``forward_only=True`` inside. Collective.

        The weights are those of the last ``optimizer.step()``, with ``overlap_param_gather`` too.
        Afterwards every part of the model is in the mode that it was in, and images that were
        assigned before, for the next step, are still: none of them is used inside.

        Example:
            >>> with coordinator.evaluation():
            ...     model.training, torch.is_grad_enabled()
            (False, False)
            >>> model.training
            True
        """
        self._gradients.gather_params_now()
        with (
            self._assignments.set_aside(),
            self._texts.set_aside(),
            evaluation_mode(self._job.model),
        ):
            yield

    @_while_open
    def save_checkpoint(
        self,
        folder: Path | str,
        optimizer: MimoOptimizer | None,
        *,
        step: int,
        extra: Mapping[str, Any] | None = None,
        rank_state: Mapping[str, Any] | None = None,
        trainable_only: bool = False,
        keep: int = 2,
        background: bool = False,
    ) -> CheckpointSave:
        """Save the training between two steps, whole or not at all. Collective.

        Holds every module's weights, the optimizer's state, each rank's random states, and
        ``extra``. A save begins with the end of the one before.

        Args:
            folder: on a file system that all ranks share; made if there is none. The checkpoint
                becomes ``step-00000050`` in it. One training at a time writes into a folder.
            optimizer: what :meth:`build_optimizer` made; None saves the weights alone.
            step: optimizer steps that were taken, more than at the save before. If nothing has
                changed since that was saved or loaded, nothing is written.
            extra: what else the trainer needs, the same on every rank, such as a scheduler's
                ``state_dict()``: dicts, lists, tuples, strings, bytes, numbers, booleans, None,
                tensors; other mappings come back as dicts. One rank writes it.
            rank_state: the same of this rank alone, such as where its data loader is.
            trainable_only: leave out the weights that are frozen; to be loaded over them.
            keep: how many checkpoints the folder keeps.
            background: return once the state is copied to host memory, and write meanwhile. It
                takes host memory for the weights and optimizer state of this rank.

        Returns:
            What was saved: ``path``, and ``wait()``, collective, which returns once a checkpoint
            that is written in the background is whole. A trainer that ends waits too.

        Raises:
            ValueError: ranks were given different things, the folder is another training's, or has
                a later step than this or than was loaded, ``extra`` holds something else, a file
                could not be written, or the save before in the background failed; on every rank.

        Example:
            >>> saved = coordinator.save_checkpoint(folder, None, step=50, extra={"lr": 1e-3})
            >>> saved.path.name
            'step-00000050'
            >>> coordinator.load_checkpoint(folder, None)
            LoadedCheckpoint(step=50, extra={'lr': 0.001})
        """
        return self._checkpoints.save(
            folder,
            optimizer,
            step=step,
            extra=extra,
            rank_state=rank_state,
            trainable_only=trainable_only,
            keep=keep,
            background=background,
        )

    @_while_open
    def load_checkpoint(
        self,
        folder: Path | str,
        optimizer: MimoOptimizer | None,
        *,
        step: int | None = None,
        strict: bool | None = None,
        names: Mapping[str, str] | None = None,
    ) -> LoadedCheckpoint:
        """Go on from a checkpoint in a folder, of this layout or another. Collective.

        A trainer may always call it, after :meth:`attach` and before the first step: without a
        checkpoint it leaves everything as it is, logs a warning, and returns step 0. Random states
        are restored on the layout that they were saved on. Before anything is overwritten, all
        files are compared with the digests that were written with them.

        What is trained, and in which precision, may have changed: the optimizer goes on with what
        it had, learning rates of its parameter groups included, begins anew with what it had not,
        and one line of the log says with how many parameters of which module.

        Args:
            folder: what :meth:`save_checkpoint` was given. Until the first checkpoint is there,
                nothing else may be in it. Or what Megatron's ``dist_checkpointing`` wrote for a
                ``MimoModel``, the folder with ``.metadata``: its weights are loaded.
            optimizer: what :meth:`build_optimizer` made; None loads the weights alone, also into
                the fp32 copies of optimizers that :meth:`build_optimizer` made or :meth:`attach`
                was given. Any other optimizer is to be made after loading.
            step: of which step; the newest if left out. ``checkpoint_steps(folder)`` lists them.
            strict: True refuses whatever is not as it was saved; False also loads into a model
                that has more weights, or fewer, and names them in the log and in what it returns.
            names: parts of names of weights here, and what stands for each in the checkpoint, such
                as ``{".to_wrap.": "."}`` for adapters around layers.

        Returns:
            ``step`` and ``extra``, as they were saved; 0 and ``{}`` if there is no checkpoint. Its
            ``rank_state`` is what this rank had given, None on another layout, where
            ``rank_states`` is what all ranks had given; ``missing_keys`` and ``unexpected_keys``
            are weights that the checkpoint, or the model, has not.

        Raises:
            ValueError: the checkpoint is damaged, of another model, of another series of
                Megatron-Core, or not this package's, or the folder has other things and no
                checkpoint; says what differs, on every rank.

        Example:
            >>> step, extra = coordinator.load_checkpoint("nowhere", None)
            >>> step, extra
            (0, {})
        """
        return self._checkpoints.load(folder, optimizer, step=step, strict=strict, names=names)

    @_while_open
    def load_weights(
        self,
        module_name: str,
        state_dict: Mapping[str, torch.Tensor],
        *,
        strict: bool = True,
        names: Mapping[str, str] | None = None,
    ) -> LoadedCheckpoint:
        """Load whole weights into one module, each rank its shards of them. Collective.

        Args:
            module_name: the module.
            state_dict: whole tensors, the same names on every rank, as the module would have them
                on one rank, each layer under its number in the whole model. Of each tensor only
                what lies on this rank is read. An embedding may be as long as its vocabulary.
            strict: whether a weight that one of both lacks is refused; else it is named in the log
                and in ``missing_keys`` and ``unexpected_keys`` of what is returned.
            names: parts of names of weights here, and what stands for each in ``state_dict``.

        Raises:
            ValueError: names or shapes differ, or ranks were given different ones; on every rank.

        Example:
            >>> coordinator.load_weights("vision", {}, strict=False).unexpected_keys
            []
        """
        return self._checkpoints.load_module(module_name, state_dict, strict, names)

    def describe(self, micro_batch_size: int | None = None) -> str:
        """The layout as text, the same on every rank; logged once a job, at INFO.

        Args:
            micro_batch_size: samples in a microbatch over all ranks; shown as shares if left out.
        """
        return describe(
            summarize(
                self._grids,
                self._job.gradient_scaling_factors,
                per_token=self._job.per_token,
                micro_batch_size=micro_batch_size,
            )
        )

    def print_description(self, micro_batch_size: int | None = None) -> None:
        """Print :meth:`describe` once a job, although every rank calls it."""
        if self._job.rank == 0:
            print(self.describe(micro_batch_size), flush=True)

    @_while_open
    def forward_backward_func(
        self,
        /,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: torch.nn.Module | list[torch.nn.Module],
        num_microbatches: int,
        forward_only: bool = False,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        encoders_first: bool = False,
        encoder_microbatches: int | None = None,
        encoder_ahead: int = 0,
        **options: Any,
    ) -> Any:
        """Megatron's ``forward_backward_pipelining_without_interleaving``, on every layout.

        Where encoders have ranks of their own it is Megatron's. Where they share ranks with a
        language model in stages, it runs three phases: the encoders, over all microbatches;
        Megatron's schedule, over the language model; the encoders' backward. Then all modules are
        finalized at once.

        ``forward_step_func`` is called for each microbatch in both of the first two phases, with
        the same batch, which is fetched once; ``model(...)`` runs the modules whose phase it is,
        and the loss function is called in the second. So it must pass the model the same in both,
        and may neither change the batch in place nor count calls. :meth:`assign_images` may be
        called in it: the second call returns what the first did.

        Args:
            forward_step_func, data_iterator, model, num_microbatches, forward_only, options: as
                Megatron's schedule takes them.
            p2p_communicator: what :meth:`build_pipeline_communicator` made.
            pg_collection: ``schedule_pg_collection``, also if left out.
            encoders_first: run three phases too where all modules share all ranks, without a
                pipeline. Elsewhere the layout decides.
            encoder_microbatches: in three phases, of how many microbatches the encoders'
                activations are kept at a time: those of the others are computed again in the third.
                All if left out; with 0 no more than one is ever there.
            encoder_ahead: how many microbatches of the next step ranks encode at the end of this
                one, where all they hold is frozen encoders (first stages); nothing elsewhere.
                Results are the same bit for bit. 0 in the step before a checkpoint is saved or
                loaded.

        Raises:
            ValueError: ``encoder_microbatches`` or ``encoder_ahead`` is no number of microbatches,
                or ``p2p_communicator`` is not this coordinator's, which three phases need.
            RuntimeError: weights of an encoder were changed after it ran ahead.
        """
        arguments = {
            "forward_step_func": forward_step_func,
            "data_iterator": data_iterator,
            "model": model if isinstance(model, list) else [model],
            "num_microbatches": num_microbatches,
            "forward_only": forward_only,
            "pg_collection": self._schedule_pg_collection
            if pg_collection is None
            else pg_collection,
            **options,
        }
        if encoder_microbatches is not None and not is_count(encoder_microbatches, least=0):
            raise ValueError(
                f"encoder_microbatches must be a number of microbatches, 0 or more, got "
                f"{encoder_microbatches!r}; leave it out to keep the activations of all"
            )
        if not is_count(encoder_ahead, least=0):
            raise ValueError(
                f"encoder_ahead must be a number of microbatches, 0 or more, got {encoder_ahead!r}"
            )
        can_choose = is_colocated(self._grids.values()) and len(self._grids) > 1
        try:
            if runs_encoders_first(self._grids) or (encoders_first and can_choose):
                return self._run_phases(p2p_communicator, encoder_microbatches, arguments)
            arguments["p2p_communicator"] = p2p_communicator
            with self._ahead.step(encoder_ahead, **arguments) as forward_step:
                return run_pipeline(**arguments | {"forward_step_func": forward_step})
        except StopIteration as error:
            raise RuntimeError(
                "this rank's data_iterator ran out within a step: it must have a batch for each of "
                "the num_microbatches, on every rank as many; leave out an epoch's last, "
                "incomplete step"
            ) from error

    def _run_phases(self, communicator: Any, keep: int | None, arguments: dict[str, Any]) -> Any:
        """A step of encoders that run before and after the language model."""
        if not any(communicator is each for each in self._communicators):
            raise ValueError(
                f"p2p_communicator is {type(communicator).__name__}, which carries nothing "
                f"between modules that take turns on a rank: pass what "
                f"coordinator.build_pipeline_communicator(config) made"
            )
        self._gradients.begin_step()
        self._to_finalize = None
        losses = self._encoders_first.run(communicator, keep, **arguments)
        if self._to_finalize is None:
            self._step.not_finalized()  # it evaluated, or nothing was attached
        else:
            num_tokens, force_all_reduce = self._to_finalize
            self.finalize_model_grads(num_tokens=num_tokens, force_all_reduce=force_all_reduce)
        return losses

    # -- what the schedule calls -------------------------------------------------------------------

    @_while_open
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the microbatches inside only accumulate; the schedule's ``no_sync_func``.

        The schedule enters it where a step begins: parameters are gathered from there on. It leaves
        it before its last backward.
        """
        if not self._turns.language:
            self._assignments.begin_pass()
            self._gradients.begin_step()
        with self._gradients.no_sync():
            yield
        self._ahead.encode()  # the last output was sent

    @_while_open
    def start_grad_sync(self, *params: Any) -> None:
        """Launch the overlapped reductions that backward did not, of all modules.

        ``finalize_model_grads`` does so by itself. ``params``, as a schedule passes them, are left.
        """
        self._gradients.start_grad_sync()

    @_while_open
    def start_param_sync(self, *params: Any) -> None:
        """Launch the overlapped gathering of all parameters; the schedule's ``param_sync_func``."""
        self._gradients.start_param_sync()

    @_while_open
    def finalize_model_grads(
        self,
        model: Any = None,
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = None,
    ) -> None:
        """Make every module's gradients those of the one loss; ``finalize_model_grads_func``.

        Each module is reduced over its own groups by Megatron's own ``finalize_model_grads``; a
        per-token loss's number of tokens is summed meanwhile, in one collective of one number.
        No module waits for another's reduction, and nothing waits for the device.

        Args:
            model, pg_collection: what the schedule passes; the coordinator's own are used.
            num_tokens: unmasked tokens that this rank counted, a tensor with one element. Only the
                count of the language model's last stage is used.
            force_all_reduce: with the distributed optimizer, have every rank end with all
                gradients, and not only with its shards.

        Raises:
            ValueError: ``num_tokens`` is missing and the loss is per token, or the reverse.
            RuntimeError: called twice in a step, or outside of one, or ``zero_grad_buffer`` was not
                called since the last one.
        """
        if self._turns.language:  # their backward is yet to come
            self._to_finalize = num_tokens, bool(force_all_reduce)
            self._gradients.start_grad_sync(language_only=True)
        else:
            self._gradients.finalize(num_tokens, bool(force_all_reduce))

    def _after_backward(self) -> None:
        """A communicator of ours has seen a backward pass, on every rank alike."""
        self._changes.check_open()
        self._step.count_backward()

    def _only_module(self, asked: str, plural: str) -> ModuleGradients:
        if len(self._modules) != 1:
            raise RuntimeError(
                f"{asked} is the only module's, but rank {self._job.rank} holds several: "
                f"{', '.join(self._modules)}; use {plural}"
            )
        return next(iter(self._modules.values()))
