"""A forward that runs a second time, for its graph alone, and leaves nothing else behind.

It draws the same random numbers and finds the buffers as they were. What it does to buffers is
forgotten, and what it tells Megatron's tracker of router losses: routers of mixtures count tokens
in their buffers, batch norms keep means there, and the first forward has done so.

Leans on ``set_moe_metrics_tracker``: without it, losses of such routers are reported twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from megatron_mimo_coord.megatron.module_random_states import module_states, restore_module_states

Buffers = Sequence[tuple[torch.nn.Module, str, torch.Tensor]]


def remember_forward(model: torch.nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What a second forward that equals the next one runs in, whenever that is; once."""
    states = module_states()
    before = [(module, name, buffer.clone()) for module, name, buffer in _buffers(model)]

    @contextmanager
    def again() -> Iterator[None]:
        states_now, now, tracker = module_states(), _buffers(model), get_moe_metrics_tracker()
        restore_module_states(states)
        _put(before)
        set_moe_metrics_tracker(MoEMetricsTracker())
        try:
            yield
        finally:
            set_moe_metrics_tracker(tracker)
            _put(now)
            restore_module_states(states_now)

    return again


def _buffers(model: torch.nn.Module) -> Buffers:
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _put(buffers: Buffers) -> None:
    for module, name, buffer in buffers:
        setattr(module, name, buffer)
