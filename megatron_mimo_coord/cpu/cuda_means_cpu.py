"""What Megatron-Core calls and a CPU lacks: "cuda" means the CPU, "nccl" means gloo."""

import contextlib
import os
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from megatron_mimo_coord.megatron import gpu_only

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that asks for a CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` with the CPU for any CUDA device."""
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs = unpinned(kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return cuda_type_name(func(*args))
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **kwargs)


def inside(mode: TorchFunctionMode, run_backward: Callable[..., Any]) -> Callable[..., Any]:
    """Around autograd's engine: PyTorch leaves a mode while it runs what the mode has let through.

    But backward runs functions of Megatron's, which name devices too. Of a backward from gradient
    edges a mode hears nothing, and is not left: twice it would take the CPU that it has put in
    place of "cuda" for the host's.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if mode in _get_current_function_mode_stack() else mode:
            return run_backward(*args, **kwargs)

    return run


def means_cuda(value: Any) -> bool:
    """Whether an argument names a CUDA device: "cuda", "cuda:1", ``torch.device("cuda")``, 0."""
    if isinstance(value, str):
        return value.startswith("cuda")
    return value.type == "cuda" if isinstance(value, torch.device) else type(value) is int


def unpinned(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments without the wish for host memory that a driver has pinned: there is no driver."""
    if not kwargs or "pin_memory" not in kwargs:  # nearly always: every function comes here
        return kwargs or {}
    return {name: value for name, value in kwargs.items() if name != "pin_memory"}


def _on_cpu(value: Any) -> Any:
    return CPU if means_cuda(value) else value


def cuda_type_name(name: str) -> str:
    """Megatron's optimizers recognise parameters by names like ``torch.cuda.FloatTensor``."""
    return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)


class NoStream:
    """A stream or event on a device that finishes each operation before it starts the next."""

    cuda_stream = 0
    _recorded = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = wait = synchronize = _nothing

    def record(self, stream: "NoStream | None" = None) -> None:
        """Remember when."""
        self._recorded = perf_counter()

    def elapsed_time(self, end: "NoStream") -> float:
        """Milliseconds from this event to a later one."""
        return (end._recorded - self._recorded) * 1000

    def record_event(self, event: "NoStream | None" = None) -> "NoStream":
        """The event itself."""
        return event or self

    def query(self) -> bool:
        """Everything is done."""
        return True


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, replacement) of everything that Megatron-Core calls and a CPU lacks."""
    from torch.distributed import distributed_c10d

    stream = NoStream()
    yield torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "current_stream", lambda device=None: stream
    yield torch.cuda, "default_stream", lambda device=None: stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "Stream", NoStream
    yield torch.cuda, "Event", NoStream
    for name in ("set_device", "synchronize", "empty_cache"):
        yield torch.cuda, name, lambda *args: None  # each its own: torch looks them up by identity
    yield torch.nn.Module, "cuda", lambda module, device=None: module

    # Megatron's tracker of random states then keeps states of the CPU generator.
    # PyTorch's own notes the seed, and a stack, for each kind of device that is not there.
    for module in (torch, torch.cuda):
        yield module, "manual_seed", _seed
    yield torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()
    yield torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
    for module in (dist, distributed_c10d):
        yield module, "new_group", _over_gloo(distributed_c10d.new_group)
        yield module, "all_reduce", _averaging_all_reduce(distributed_c10d.all_reduce)
        yield (
            module,
            "reduce_scatter_tensor",
            _averaging_reduce_scatter(distributed_c10d.reduce_scatter_tensor),
        )
        yield module, "all_gather", _uneven_all_gather(distributed_c10d.all_gather)
        yield module, "reduce_scatter", _uneven_reduce_scatter(distributed_c10d.reduce_scatter)
    for what, (owner, name) in gpu_only.places().items():
        yield owner, name, _INSTEAD[what]


def _seed(seed: Any) -> torch.Generator:
    return torch.default_generator.manual_seed(int(seed))


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_INSTEAD: dict[str, Callable[..., Any]] = {
    "get a random state": lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    ),
    "set a random state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
    "draw from a random state": gpu_only.drawing_from,
    # Of mixture-of-experts layers, which want split sizes that Python can read.
    "copy split sizes": _to_numpy,
    "reduce and scatter": lambda *args, **options: dist.reduce_scatter_tensor(*args, **options),
}


def _over_gloo(new_group: Callable[..., Any]) -> Callable[..., Any]:
    def over_gloo(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *more: Any, **options: Any
    ) -> Any:
        return new_group(ranks, timeout, "gloo" if backend == "nccl" else backend, *more, **options)

    return over_gloo


_averaging_groups: list[str] = [""]


@contextlib.contextmanager
def _as_sum(op: Any, group: Any) -> Iterator[tuple[Any, int]]:
    """Gloo cannot average: what to launch instead, and what to divide by first."""
    if op != dist.ReduceOp.AVG or dist.get_rank(group) < 0:
        yield op, 1
        return
    world: Any = dist.group.WORLD
    _averaging_groups.append((group or world).group_name)
    try:
        yield dist.ReduceOp.SUM, dist.get_world_size(group)
    finally:
        _averaging_groups.pop()


def averaging_group() -> str:
    """The group on which an average is taken now, as a division and a sum; empty if none is."""
    return _averaging_groups[-1]


def _averaging_all_reduce(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    def averaging(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        with _as_sum(op, group) as (op, size):
            if size > 1:
                tensor.div_(size)
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
        with _as_sum(op, group) as (op, size):
            input = input / size if size > 1 else input
            return reduce_scatter(output, input, op=op, group=group, async_op=async_op)

    return averaging


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo wants one size on all ranks: send as many rows as the largest has."""

    def gathering(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        most = _most_rows(tensor_list)
        if most is None or async_op:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = [tensor.new_empty((most, *tensor.shape[1:])) for _ in tensor_list]
        all_gather(padded, _padded(tensor, most), group=group)
        for part, rows in zip(tensor_list, padded, strict=True):
            part.copy_(rows[: len(part)])
        return None

    return gathering


def _uneven_reduce_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    def scattering(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        most = _most_rows(input_list)
        if most is None or async_op:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        padded = output.new_empty((most, *output.shape[1:]))
        reduce_scatter(padded, [_padded(part, most) for part in input_list], op=op, group=group)
        output.copy_(padded[: len(output)])
        return None

    return scattering


def _most_rows(parts: list[torch.Tensor]) -> int | None:
    """Rows of the largest part; None if all have as many, as gloo wants."""
    rows = {len(part) if part.ndim else 0 for part in parts}
    return max(rows) if len(rows) > 1 else None


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    padding = tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))
    return torch.cat([tensor, padding])
