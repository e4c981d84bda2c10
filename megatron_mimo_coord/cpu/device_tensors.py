"""Which tensors a GPU would hold: made for "cuda", moved there, or computed from such.

On CPU ranks all memory is the host's. A mark on a tensor's storage tells the two apart; views share
their storage, so they share the mark. PyTorch keeps a storage's Python object for as long as the
storage lives, so nothing has to be looked up or cleaned. Whatever is computed from a marked tensor
is marked where PyTorch dispatches it, see ``rehearsal.py``.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron_mimo_coord.cpu.cuda_means_cpu import (
    CPU,
    CudaMeansCpu,
    cuda_type_name,
    means_cuda,
    unpinned,
)
from megatron_mimo_coord.cpu.host_sync import host_sync_allowed, waits_for_device
from megatron_mimo_coord.cpu.location import caller

# What ``tensor.device`` of a device tensor says. To PyTorch it is the CPU like torch.device("cpu");
# here it is told apart, so that ``torch.empty(..., device=tensor.device)`` is a device tensor too.
DEVICE = torch.device("cpu", 0)
_MARK = "_is_device_memory"


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a GPU would hold this tensor.

    Example:
        >>> is_on_device(torch.zeros(2))
        False
    """
    with torch._C.DisableTorchFunction():
        return any_on_device((tensor,))


def any_on_device(values: Iterable[Any]) -> bool:
    """Whether any of an operator's arguments is; for callers that have turned off this mode."""
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage() if value.layout is torch.strided else _values(value)
            if hasattr(storage, _MARK):
                return True
        elif isinstance(value, (list, tuple)) and any_on_device(value):
            return True
    return False


def mark(value: Any) -> None:
    """Say of all tensors in a value that a GPU would hold them."""
    for tensor in tensors_in((value,)):
        with torch._C.DisableTorchFunction():
            if tensor.layout is torch.strided:
                setattr(tensor.untyped_storage(), _MARK, True)
            elif (values := _values(tensor)) is not None:
                setattr(values, _MARK, True)


def _values(tensor: torch.Tensor) -> Any:
    """The storage of a sparse tensor's values."""
    get = _GET_VALUES.get(tensor.layout)
    return get(tensor).untyped_storage() if get else None


_GET_VALUES: dict[torch.layout, Callable[..., torch.Tensor]] = {
    torch.sparse_coo: torch.Tensor._values,
    **dict.fromkeys(
        (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
        torch.Tensor.values,
    ),
}


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors in arguments or results of an operator, lists of them included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class DeviceTensors(CudaMeansCpu):
    """Like its base, and marks what is made for "cuda" or moved there."""

    def __init__(self) -> None:
        super().__init__()
        # What the function that Python called last was given; None: PyTorch's own C++ runs.
        self._calls: list[tuple[Any, dict[str, Any]] | None] = []

    def __enter__(self) -> "DeviceTensors":
        """Also around backward, see ``inside``."""
        self._calls.append(None)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Go back to what ran before."""
        self._calls.pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = unpinned(kwargs) if kwargs else {}  # nearly always none: every function comes here
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, args, kwargs)
        self._calls.append((args, kwargs))
        try:
            if not kwargs or kwargs.get("device") is None:
                return func(*args, **kwargs)
            wants_device = _is_device(kwargs["device"])
            if wants_device and func in _FROM_HOST and not _is_device_tensor(args[:1]):
                waits_for_device(f"torch.{func.__name__} with device=")
            return _placed(func(*args, **{**kwargs, "device": CPU}), wants_device, args)
        finally:
            self._calls.pop()

    def makes_device_tensors(self) -> bool:
        """Whether a tensor that PyTorch makes of no other is the device's.

        So are those that a function of device tensors makes, and the zeros of backward where it has
        no gradient. What Python makes says itself where.
        """
        call = self._calls[-1]
        if call is None:
            return bool(torch._C._current_graph_task_id() != -1)
        args, kwargs = call
        return any_on_device(args) or any_on_device(kwargs.values())


def _is_device_tensor(first: Any) -> bool:
    return bool(first) and isinstance(first[0], torch.Tensor) and is_on_device(first[0])


def _is_device(value: Any) -> bool:
    return means_cuda(value) or value == DEVICE


def _placed(result: Any, wants_device: bool, given: Any) -> Any:
    """A tensor that was made, on the side that was asked for."""
    if not isinstance(result, torch.Tensor) or is_on_device(result) == wants_device:
        return result
    storage = result.untyped_storage()
    if any(each.untyped_storage() is storage for each in tensors_in(given)):
        result = result.clone()  # a GPU's driver would have copied it
    if wants_device:
        mark(result)
    elif is_on_device(result):
        delattr(result.untyped_storage(), _MARK)
    return result


def _to(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    target = kwargs.get("device", rest[0] if rest else kwargs.get("other"))
    if isinstance(target, torch.Tensor):
        target = DEVICE if is_on_device(target) else CPU
    if not isinstance(target, (str, int, torch.device)):
        return func(*args, **kwargs)  # another dtype
    return _moved(
        func(*(_host(each) for each in args), **{k: _host(v) for k, v in kwargs.items()}),
        _is_device(target),
        tensor,
        _non_blocking(rest, kwargs),
    )


def _non_blocking(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """As given by name, or as the first truth value of ``to`` and ``cuda``."""
    return kwargs.get(
        "non_blocking", next((each for each in args if isinstance(each, bool)), False)
    )


def _host(value: Any) -> Any:
    return CPU if isinstance(value, (str, torch.device)) or type(value) is int else value


def _cuda(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return _moved(args[0], True, args[0], _non_blocking(args, kwargs))


def _cpu(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return _moved(args[0], False, args[0], False)


def _moved(result: Any, wants_device: bool, tensor: torch.Tensor, non_blocking: bool) -> Any:
    if wants_device != is_on_device(tensor) and not non_blocking:
        where = "the device" if wants_device else "the host"
        waits_for_device(f"a copy to {where} without non_blocking")
    return _placed(result, wants_device, (tensor,))


def _read(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if is_on_device(args[0]):
        waits_for_device(f"Tensor.{func.__name__}")
    return func(*args, **kwargs)


def pickling(reduce_ex: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``Tensor.__reduce_ex__``, which ``torch.save`` calls too; no mode sees it."""

    def reduce_or_refuse(tensor: torch.Tensor, protocol: Any) -> Any:
        if is_on_device(tensor) and not _is_shallow_copy():
            waits_for_device("pickling a tensor")
        return reduce_ex(tensor, protocol)

    return reduce_or_refuse


def _is_shallow_copy() -> bool:
    """``copy.copy`` asks for what is pickled too, and copies no numbers."""
    return f"{os.sep}copy.py:" in caller()


def _deepcopy(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    with host_sync_allowed():  # its storage is copied as if it were the host's
        result = func(*args, **kwargs)
    if is_on_device(args[0]):
        mark(result)
    return result


def _one_hot(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if not any_on_device((*args, *kwargs.values())):
        return func(*args, **kwargs)
    if kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1:
        waits_for_device("one_hot without num_classes")
    with host_sync_allowed():  # only CPUs check that classes are in range
        return func(*args, **kwargs)


def _tensor_split(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if any_on_device((*args[1:], *kwargs.values())):
        waits_for_device("tensor_split at places that a device tensor tells")
    return func(*args, **kwargs)


def _new_tensor(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    wanted = kwargs.get("device")
    wants_device = is_on_device(args[0]) if wanted is None else _is_device(wanted)
    if wants_device:
        waits_for_device("Tensor.new_tensor")
    return _placed(func(*args, **{**kwargs, "device": None}), wants_device, args)


def _device(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return DEVICE if is_on_device(args[0]) else func(*args, **kwargs)


def _type(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    return cuda_type_name(result) if isinstance(result, str) and is_on_device(args[0]) else result


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.pin_memory: lambda func, args, kwargs: args[0],
    torch.Tensor.type: _type,
    torch.Tensor.device.__get__: _device,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.__array__: _read,
    torch.Tensor.tensor_split: _tensor_split,
    torch.tensor_split: _tensor_split,
    torch.nn.functional.one_hot: _one_hot,
    torch.Tensor.tolist: _read,
    torch.Tensor.numpy: _read,
    torch.Tensor.__repr__: _read,
    torch.Tensor.__format__: _read,
}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray}
