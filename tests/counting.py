"""Counts what reaches PyTorch's dispatcher: collectives, host waits, bytes scaled in place."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    """Every collective, host sync and in-place scaling that reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.syncs: list[str] = []
        self.scaled_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        tensors = [value for value in _flat(args) if hasattr(value, "numel")]
        if name.startswith("c10d::"):
            self.collectives.append((name, max(tensor.numel() for tensor in tensors)))
        if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "aten::nonzero")):
            self.syncs.append(name)
        if any(word in name for word in ("mul_", "div_")):
            grads = _flat(args[:1])
            self.scaled_bytes += sum(tensor.numel() * tensor.element_size() for tensor in grads)
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> list[Any]:
    return (
        [leaf for item in value for leaf in _flat(item)]
        if isinstance(value, (list, tuple))
        else [value]
    )
