"""Megatron's schedule: the config that it reads, and the functions that it calls through it.

Leans on the schedule calling ``no_sync_func``, ``finalize_model_grads_func``, ``grad_scale_func``,
``grad_sync_func`` and ``param_sync_func`` of the config of the outermost model, and on it launching
reductions during the last backward only where ``grad_sync_func`` is None. Without the first two no
step is finalized. It frees an output once it is sent, with ``deallocate_pipeline_outputs``, and
refuses one that is a view; ``make_viewless_tensor`` is what Megatron's own layers end with. Its
``forward_step`` runs a trainer's forward step on a stage that is not the last.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
    forward_step,
)
from megatron.core.utils import make_viewless_tensor

from megatron_mimo_coord.megatron.changes import Changes

Hooks = Mapping[str, Callable[..., Any] | None]
"""Functions by the name of their place in a config; None for a place that nobody may take."""


def check_sequence_lengths(config: ModelParallelConfig) -> None:
    """Refuse a config with which Megatron's schedule cannot run several modules.

    Raises:
        ValueError: ``variable_seq_lengths`` is off.
    """
    if not config.variable_seq_lengths:
        raise ValueError(
            "modules exchange tensors whose shapes vary, but config.variable_seq_lengths is False: "
            'set it to True (a mixture-of-experts model then needs moe_token_dispatcher_type="'
            'alltoall")'
        )


def hand_over_no_views(model: torch.nn.Module, changes: Changes) -> None:
    """Have a model's outputs be no views, which the schedule could not free. Nothing is copied."""

    def without_views(_: torch.nn.Module, __: Any, returned: Any) -> Any:
        if isinstance(returned, tuple):
            output, *loss_mask = returned
            return _without_views(output), *loss_mask
        return _without_views(returned)

    changes.on_close(model.register_forward_hook(without_views).remove)


def _without_views(output: Any) -> Any:
    if isinstance(output, dict):
        return {name: _without_views(tensor) for name, tensor in output.items()}
    if not isinstance(output, torch.Tensor):
        return output
    graph = torch.is_grad_enabled()
    viewless = make_viewless_tensor(output, output.requires_grad, keep_graph=graph)
    if viewless is not output:
        vars(viewless).update(vars(output))  # such as how many tokens each sample has
    return viewless


class Schedule:
    """What the schedule calls.

    Args:
        wrapped, model: what it runs: the model, or a chain of ``.module`` that ends in it.
        changes: where is recorded what is set.

    Attributes:
        config: the one whose hooks are set; before that, the one that the schedule reads.
        is_attached: whether hooks are set.
    """

    def __init__(self, wrapped: Any, model: torch.nn.Module, changes: Changes) -> None:
        self._read = list(_configs(wrapped, model))
        self.config: ModelParallelConfig = self._read[-1]
        self.is_attached = False
        self._hooks: Hooks = {}
        self._changes = changes
        self._set = Changes()

    def attach(self, config: ModelParallelConfig, hooks: Hooks) -> None:
        """Set hooks, and give those up that were set before.

        Args:
            config: the config that the schedule reads.
            hooks: what it is to call.

        Raises:
            ValueError: someone else has set one of them. Nothing is set then.
        """
        self._changes.take(config)
        ours = self._hooks if config is self.config else {}
        places = {name: getattr(config, name) for name in hooks}
        taken = {
            name: hook
            for name, hook in places.items()
            if hook is not None and hook not in (ours.get(name), hooks[name])
        }
        if taken:
            named = ", ".join(f"config.{name} is {_name(hook)}" for name, hook in taken.items())
            cure = " = ".join(f"config.{name}" for name in taken)
            raise ValueError(
                f"the coordinator needs places that others have taken: {named}; set {cure} = None "
                f"before attach, and leave that to the coordinator"
            )
        self._set.close()
        self._set = Changes()
        for name, hook in hooks.items():
            self._set.set(config, name, hook)
        self._changes.on_close(self._set.close)
        self.config, self._hooks, self.is_attached = config, hooks, True

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss as the schedule scales it before its backward."""
        scale = self.config.grad_scale_func
        return loss if scale is None else scale(loss)

    @property
    def reads_what_is_attached(self) -> bool:
        """Whether the schedule reads the config whose hooks are set, and no copy of it."""
        return any(config is self.config for config in self._read)

    @property
    def calls_another(self) -> bool:
        """Whether it has somebody else finalize gradients."""
        hooks = [config.finalize_model_grads_func for config in self._read]
        ours = self._hooks.get("finalize_model_grads_func")
        return any(hook not in (None, ours) for hook in hooks)


def _configs(wrapped: Any, model: Any) -> Iterator[ModelParallelConfig]:
    """Those of a model and of what is around it, the model's last."""
    while wrapped is not model:
        yield getattr(wrapped, "config", model.config)
        wrapped = wrapped.module
    yield model.config


def _name(function: Any) -> str:
    """What a function is called where it is written."""
    if isinstance(function, partial):
        return f"a partial of {_name(function.func)}"
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else f"of class {type(function).__qualname__}"


run_pipeline = forward_backward_pipelining_without_interleaving
"""Megatron's 1F1B schedule."""


def run_encoders(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: torch.nn.Module,
    config: ModelParallelConfig,
    microbatch: int,
    num_microbatches: int,
) -> Any:
    """One forward step in which encoders run, as Megatron's schedule does it; what they return."""
    outputs: Any = None

    def encode(data_iterator: Any, model: Any, *_: Any) -> Any:
        nonlocal outputs
        checkpoint = config.num_microbatches_with_partial_activation_checkpoints is not None
        outputs, _ = forward_step_func(data_iterator, model, *[False] * checkpoint)
        return torch.zeros((), device=torch.cuda.current_device()), None

    forward_step(
        encode,
        data_iterator,
        model,
        num_microbatches,
        {},
        [],
        config,
        None,
        is_first_microbatch=microbatch == 0,
        current_microbatch=microbatch,
        is_last_stage=False,
    )
    return outputs
