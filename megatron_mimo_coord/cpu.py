"""Runs Megatron-Core on CPU ranks over gloo: a laptop stands in for a cluster.

Megatron-Core writes ``device="cuda"`` and ``backend="nccl"`` into its own code. On a machine
without a GPU for each rank, :func:`enable_cpu_ranks` makes those words mean the CPU and gloo, so
that the real models, schedules, communicators and optimizers run as they are. It is never called
for you, and nothing else in this package knows about it: on GPUs no line of this file runs.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_enabled: list[TorchFunctionMode] = []


def enable_cpu_ranks() -> None:
    """Make this process a CPU rank: "cuda" means the CPU, "nccl" means gloo.

    Call it once, before building any model, and initialise ``torch.distributed`` with gloo. It
    lasts for the life of the process; calling it again changes nothing.

    Example:
        >>> enable_cpu_ranks()
        >>> torch.zeros(2, device="cuda").device
        device(type='cpu')
    """
    if _enabled:
        return
    # Compiling takes longer than a laptop run itself, and TorchFunctionMode would break the graphs.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    for owner, name, replacement in _replacements():
        setattr(owner, name, replacement)
    mode = _CudaMeansCpu()
    mode.__enter__()
    _enabled.append(mode)


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that asks for a CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _cuda_type_name(func(*args))
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **(kwargs or {}))


def _on_cpu(value: Any) -> Any:
    is_cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return _CPU if is_cuda else value


def _cuda_type_name(name: str) -> str:
    """Megatron's optimizers recognise parameters by names like ``torch.cuda.FloatTensor``."""
    return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)


class _NoStream:
    """A stream or event on a device that finishes each operation before it starts the next."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = wait = record = synchronize = _nothing

    def record_event(self, event: "_NoStream | None" = None) -> "_NoStream":
        return event or self

    def query(self) -> bool:
        return True


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, replacement) of everything that Megatron-Core calls and a CPU lacks."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher
    from torch.distributed import distributed_c10d

    stream = _NoStream()
    yield torch.cuda, "current_device", lambda: _CPU
    yield torch.cuda, "current_stream", lambda device=None: stream
    yield torch.cuda, "default_stream", lambda device=None: stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "Stream", _NoStream
    yield torch.cuda, "Event", _NoStream
    for name in ("set_device", "synchronize", "empty_cache"):
        yield torch.cuda, name, lambda *args: None  # each its own: torch looks them up by identity
    yield torch.nn.Module, "cuda", lambda module, device=None: module

    # Megatron's tracker of random states then keeps states of the CPU generator.
    yield torch.cuda, "manual_seed", torch.manual_seed
    yield torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()
    yield torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
    yield (
        megatron_random,
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
    )
    yield (
        megatron_random,
        "_set_cuda_rng_state",
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
    )

    yield megatron_random.CudaRNGStatesTracker, "fork", _fork

    # The token dispatcher of mixture-of-experts layers wants split sizes that Python can read.
    yield token_dispatcher, "maybe_move_tensor_to_cpu", _to_numpy

    for module in (dist, distributed_c10d):
        yield module, "new_group", _over_gloo(distributed_c10d.new_group)
        yield module, "all_reduce", _averaging_all_reduce(distributed_c10d.all_reduce)
        yield (
            module,
            "reduce_scatter_tensor",
            _averaging_reduce_scatter(distributed_c10d.reduce_scatter_tensor),
        )
    from megatron.core.distributed import param_and_grad_buffer

    yield param_and_grad_buffer, "dist_reduce_scatter_func", dist.reduce_scatter_tensor


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from a state of the tracker; its own ``fork`` takes the one generator for two."""
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _over_gloo(new_group: Callable[..., Any]) -> Callable[..., Any]:
    def over_gloo(
        ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any
    ) -> Any:
        return new_group(ranks, timeout, "gloo" if backend == "nccl" else backend, **options)

    return over_gloo


def _averaging_all_reduce(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo cannot average: divide first, then sum."""

    def averaging(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op == dist.ReduceOp.AVG:
            tensor.div_(dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    return averaging


def _averaging_reduce_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    def averaging(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op == dist.ReduceOp.AVG:
            input = input / dist.get_world_size(group)
            op = dist.ReduceOp.SUM
        return reduce_scatter(output, input, op=op, group=group, async_op=async_op)

    return averaging
