"""What a rank launches on a process group: read from the operator that PyTorch dispatches."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import field, frozen, mutable

from megatron_mimo_coord.cpu.cuda_means_cpu import averaging_group
from megatron_mimo_coord.cpu.device_tensors import tensors_in
from megatron_mimo_coord.cpu.location import caller
from megatron_mimo_coord.cpu.process_groups import Group

_ReduceOp: Any = torch._C._distributed_c10d.ReduceOp

NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "coalesced all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced_": "coalesced all_gather_into_tensor",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_": "coalesced reduce_scatter_tensor",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "recv_any_source_": "recv from any rank",
}


def _rows(rows: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)


@frozen
class Message:
    """What must be the same on two ranks that launch together. Travels as JSON.

    Args:
        group: PyTorch's name of the process group.
        group_text: what people call it.
        operation: as in ``torch.distributed``.
        agree: what all ranks must say alike: (what, value).
        sends: what the other rank is sent, each with (dtype, elements).
        takes: what it must send.
        where: the line.
    """

    group: str
    group_text: str
    operation: str
    agree: tuple[tuple[str, str], ...] = field(default=(), converter=_rows)
    sends: tuple[tuple[str, str], ...] = field(default=(), converter=_rows)
    takes: tuple[tuple[str, str], ...] = field(default=(), converter=_rows)
    where: str = ""

    def __str__(self) -> str:
        details = [f"{what} {value}" for what, value in self.agree]
        for verb, parts in (("sends", self.sends), ("takes", self.takes)):
            details += [f"{verb} {count} {dtype}" for dtype, count in parts]
        told = f" ({', '.join(details)})" if details else ""
        return f"{self.operation}{told} on {self.group_text} at {self.where}"


@mutable
class Launch:
    """One operation on one group, or a batch of sends and receives.

    Args:
        group: the process group.
        name: of the operation.
        rank: this rank.
        reduction: such as SUM, where the operation reduces.
        messages: for each other rank concerned, what must agree.
        reads: tensors that it reads.
        writes: tensors that it writes.
        turns: for each other rank concerned, the number of the launch among those of both.
        timeout: tells for how many seconds to wait.
    """

    group: Group
    name: str
    rank: int
    reduction: str = ""
    messages: dict[int, Message] = field(factory=dict)
    reads: list[torch.Tensor] = field(factory=list)
    writes: list[torch.Tensor] = field(factory=list)
    turns: dict[int, int] = field(factory=dict)
    timeout: Callable[[], float] = float

    def __str__(self) -> str:
        return str(next(iter(self.messages.values()), f"{self.name} on {self.group}"))

    def and_also(self, other: "Launch") -> None:
        """Make another one part of this batch."""
        for rank, message in other.messages.items():
            before = self.messages.get(rank)
            self.messages[rank] = Message(
                group=message.group,
                group_text=message.group_text,
                operation="batch_isend_irecv",
                sends=(before.sends if before else ()) + message.sends,
                takes=(before.takes if before else ()) + message.takes,
                where=message.where,
            )
        self.timeout = other.timeout


def read_launch(group: Group, rank: int, func: Any, args: Sequence[Any]) -> Launch:
    """What an operator launches.

    Args:
        group: its process group.
        rank: this rank.
        func: one of ``torch.ops.c10d``.
        args: its arguments.
    """
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}  # noqa: B905
    raw = func._opname
    name = NAMES.get(raw, raw.strip("_"))
    tensors = list(tensors_in([given.get("tensors")]))
    inputs = list(tensors_in(v for k, v in given.items() if k.startswith("input")))
    outputs = list(tensors_in(v for k, v in given.items() if k.startswith("output")))
    where = caller()
    is_send = name == "send"
    launch = Launch(
        group=group,
        name=name,
        rank=rank,
        reduction=_reduction(given["reduce_op"]) if "reduce_op" in given else "",
        reads=inputs + (tensors if is_send else []),
        writes=outputs + ([] if is_send else tensors),
    )
    others = [(index, each) for index, each in enumerate(group.ranks) if each != rank]

    def message(**parts: Any) -> Message:
        return Message(
            group=group.name, group_text=str(group), operation=name, where=where, **parts
        )

    if name in ("send", "recv"):
        index = given.get("dst", given.get("src"))
        others = [] if index is None else [(index, group.ranks[index])]
        parts = tuple((dtype_name(each), _elements(each)) for each in tensors)
        for _, other in others:
            launch.messages[other] = message(**{"sends" if is_send else "takes": parts})
        return launch
    if name.startswith("all_to_all"):
        for index, other in others:
            launch.messages[other] = message(
                sends=_share(inputs, given.get("input_split_sizes"), index, len(group.ranks)),
                takes=_share(outputs, given.get("output_split_sizes"), index, len(group.ranks)),
            )
        return launch
    shared = tensors or (outputs if "scatter" in name else inputs)
    many = inputs if "scatter" in name else outputs
    agree = []
    if shared:
        agree.append(("dtype", ", ".join(sorted({dtype_name(each) for each in shared}))))
        if len({each.numel() for each in many}) <= 1 or tensors or "coalesced" in name:
            agree.append(("elements", ", ".join(map(_elements, shared))))
    if launch.reduction:
        agree.append(("reduction", launch.reduction))
    if "root_rank" in given:
        agree.append(("root", f"rank {group.ranks[given['root_rank']]}"))
    one = message(agree=tuple(agree))
    launch.messages = {other: one for _, other in others}
    return launch


def _reduction(boxed: Any) -> str:
    if averaging_group():
        return "AVG"
    if isinstance(boxed, torch.ScriptObject):
        if not hasattr(_ReduceOp, "unbox"):
            return "unknown"  # PyTorch 2.6 does not tell
        boxed = _ReduceOp.unbox(boxed)
    names = ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "BAND", "BOR", "BXOR")
    return next((name for name in names if boxed == getattr(dist.ReduceOp, name)), "another")


def _share(
    tensors: list[torch.Tensor], sizes: Sequence[int] | None, index: int, ranks: int
) -> tuple[tuple[str, str], ...]:
    """What one rank's part of an all-to-all is."""
    if sizes is None and len(tensors) == ranks:
        return ((dtype_name(tensors[index]), _elements(tensors[index])),)
    [tensor] = tensors
    rows = sizes[index] if sizes else len(tensor) // ranks
    row = tensor.numel() // max(len(tensor), 1)
    return ((dtype_name(tensor), str(rows * row)),)


def memory_format(tensor: torch.Tensor) -> torch.memory_format | None:
    """In which of PyTorch's formats a tensor is contiguous; None if in none."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for each in (torch.contiguous_format, formats.get(tensor.dim())):
        if each is not None and tensor.is_contiguous(memory_format=each):
            return each
    return None


def _elements(tensor: torch.Tensor) -> str:
    """How many, and in which order if not in the usual one."""
    order = memory_format(tensor)
    is_usual = order is None or order is torch.contiguous_format
    return str(tensor.numel()) if is_usual else f"{tensor.numel()} {str(order).split('.')[-1]}"


def dtype_name(tensor: torch.Tensor) -> str:
    """Its dtype as in ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")
