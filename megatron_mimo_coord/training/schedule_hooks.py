"""The places in a config through which Megatron's schedule calls a coordinator; who owns each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig

HOOKS = (
    "no_sync_func",
    "finalize_model_grads_func",
    "grad_scale_func",
    "grad_sync_func",
    "param_sync_func",
)
_OWNED = "_mimo_hooks"
"""Attribute of a config: the hooks that a coordinator has set there, by name."""


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


def hooks_of(
    coordinator: Any, ddp_configs: Iterable[DistributedDataParallelConfig], optimizer: Any
) -> dict[str, Callable[..., Any] | None]:
    """What a coordinator has the schedule call, by the name of the place.

    Args:
        coordinator: whose methods they are.
        ddp_configs: of the modules on this rank.
        optimizer: Megatron's, which knows the loss scale; None if the trainer scales.
    """
    configs = list(ddp_configs)
    hooks: dict[str, Callable[..., Any] | None] = {
        "no_sync_func": coordinator.no_sync,
        "finalize_model_grads_func": coordinator.finalize_model_grads,
    }
    if optimizer is not None:
        hooks["grad_scale_func"] = optimizer.scale_loss
    if any(config.overlap_grad_reduce for config in configs):
        hooks["grad_sync_func"] = None  # with one, most stages would reduce after backward
    if any(config.overlap_param_gather and config.align_param_gather for config in configs):
        hooks["param_sync_func"] = coordinator.start_param_sync
    return hooks


def install_hooks(
    config: ModelParallelConfig, hooks: Mapping[str, Callable[..., Any] | None]
) -> None:
    """Set hooks, and take back those of the coordinator before that are not set again.

    Args:
        config: the config that the schedule reads.
        hooks: some of ``HOOKS``, by name; None for one that nobody may set.

    Raises:
        ValueError: someone else has set one of them. Nothing is set then.
    """
    owned: dict[str, Any] = vars(config).get(_OWNED, {})
    for name in hooks:
        current = getattr(config, name)
        if current is not None and current not in (owned.get(name), hooks[name]):
            raise ValueError(
                f"config.{name} is already {current!r}; the coordinator needs that place: set "
                f"config.{name} = None before attach, and leave it to the coordinator"
            )
    for name, hook in owned.items():
        if name not in hooks and getattr(config, name) == hook:
            setattr(config, name, None)
    for name, hook in hooks.items():
        setattr(config, name, hook)
    setattr(config, _OWNED, dict(hooks))
