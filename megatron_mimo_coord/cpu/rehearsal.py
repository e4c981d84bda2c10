"""NCCL's rules on CPU ranks: what would hang or be wrong on GPUs is an error here, with a sentence.

On every process group that would be NCCL's

- tensors are on the device (``device_tensors.py``), contiguous, of a dtype that NCCL knows;
- ranks that launch together launch the same, and two ranks that share several groups launch on
  them in one order (``launch_rules.py``);
- no rank waits for ever (``peers.py``), with ``CUDA_LAUNCH_BLOCKING=1`` not even one whose launches
  wait until they are done;
- only public names exist, and none can be used once it is destroyed (``process_groups.py``);
- a work is waited for before its tensors are used (``works.py``);

and inside ``no_host_sync()`` nothing makes the host wait for the device (``host_sync.py``).

Not seen are functional collectives (``_c10d_functional``), and what other threads launch.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.hyper_comm_grid import HyperCommGrid
from torch.distributed import distributed_c10d
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mimo_coord.cpu import process_groups
from megatron_mimo_coord.cpu.cuda_means_cpu import NoStream, averaging_group
from megatron_mimo_coord.cpu.device_tensors import (
    DeviceTensors,
    any_on_device,
    is_on_device,
    mark,
    pickling,
    tensors_in,
)
from megatron_mimo_coord.cpu.host_sync import is_forbidden, waits_for_device
from megatron_mimo_coord.cpu.launch_rules import refuse_what_nccl_refuses
from megatron_mimo_coord.cpu.launches import Launch, read_launch
from megatron_mimo_coord.cpu.peers import Peers
from megatron_mimo_coord.cpu.process_groups import nccl_group
from megatron_mimo_coord.cpu.works import InFlight, end_of_step, works

_C: Any = torch._C._distributed_c10d
# Operators whose result's size or value the host must know.
_READS = {
    "_local_scalar_dense": "reading a number (item, bool, float, int, format)",
    "nonzero": "nonzero",
    "equal": "equal",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique_consecutive",
    "bincount": "bincount",
    "allclose": "allclose",
    "repeat_interleave": "repeat_interleave by device numbers without output_size",
}
# Operators that are given indices, and where.
_INDEXES = {"index": 1, "index_put": 1, "index_put_": 1, "_index_put_impl_": 1, "index_fill_": 2}
_MOVES = {"copy_", "set_", "resize_", "resize_as_"}


@frozen
class Operator:
    """What there is to know about one of PyTorch's operators.

    Args:
        name: its name without overload.
        is_launch: it is one of ``torch.distributed``.
        is_view: it touches no data.
        is_factory: it is given no tensor.
        has_tensor_options: some of its tensors are given by name only, such as ``out``.
        written: which arguments it writes to, by place and by name.
    """

    name: str
    is_launch: bool
    is_view: bool
    is_factory: bool
    has_tensor_options: bool
    written: frozenset[int | str]

    @classmethod
    def of(cls, func: Any) -> "Operator":
        """Read it from the operator's schema."""
        schema = func._schema
        written = {
            key
            for index, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for key in (index, argument.name)
        }
        returned = [each.alias_info for each in schema.returns]
        tensors = [each for each in schema.arguments if "Tensor" in str(each.type)]
        return cls(
            name=func._opname,
            is_launch=func.namespace == "c10d",
            is_view=bool(returned) and all(returned) and not written,
            is_factory=not tensors,
            has_tensor_options=any(each.kwarg_only for each in tensors),
            written=frozenset(written),
        )


class Rehearsal(TorchDispatchMode):
    """Sees every operator and every launch of this process's main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.device_tensors = DeviceTensors()
        self._operators: dict[Any, Operator] = {}
        self._peers: Peers | None = None
        self._rank = 0
        self._batch: Launch | None = None
        self._wait = _quietly(_C.Work.wait)
        self._new_group = distributed_c10d.new_group

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return (
            False  # nothing is compiled here, and PyTorch's way to say so costs more than this mode
        )

    # -- operators ---------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; what is computed from device tensors becomes one."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            operator = self._operators.get(func)
            if operator is None:
                operator = self._operators[func] = Operator.of(func)
            if operator.is_launch:
                return self._launch(func, args, kwargs)
            if operator.is_view:
                return func(*args, **kwargs)
            if operator.is_factory:
                on_device = self.device_tensors.makes_device_tensors()
            else:
                on_device = any_on_device(args) or (
                    operator.has_tensor_options and any_on_device(kwargs.values())
                )
                if works.in_flight:
                    self._check_use(_uses(operator, args, kwargs), averaging_group())
                if is_forbidden():
                    _check_sync(operator, args, kwargs, on_device)
            result = func(*args, **kwargs)
            if on_device and operator.name not in _MOVES:
                mark(result)
        return result

    # -- launches ----------------------------------------------------------------------------------

    def _launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        process_group = _process_group(args)
        group = nccl_group(process_group) if process_group else None
        if group is None or (self._peers is None and not group.is_destroyed):
            return func(*args, **kwargs)
        launch = read_launch(group, self._rank, func, args)
        if launch.name == "barrier":
            waits_for_device("barrier")
        tensors = (*launch.reads, *launch.writes)
        if group.takes_host_tensors and not any(map(is_on_device, tensors)):
            return func(*args, **kwargs)
        try:
            refuse_what_nccl_refuses(launch)
        except RuntimeError as error:
            if self._peers is not None:
                self._peers.tell_refusal(launch, str(error))
            raise
        assert self._peers is not None
        launch.timeout = partial(process_groups.timeout_of, process_group)
        uses = [(each, False) for each in launch.reads] + [(each, True) for each in launch.writes]
        self._check_use(uses, group.name)
        if launch.name in ("send", "recv"):
            args = (*args[:-1], 0)  # the tag, which NCCL ignores
        if self._batch is None:
            self._peers.tell(launch)
        else:
            self._batch.and_also(launch)
        result = func(*args, **kwargs)
        work = _C.Work.unbox(result[-1] if isinstance(result, tuple) else result)
        in_flight = works.add(work, self._batch or launch, launch)
        if self._batch is None and _launches_block():
            self._finish(in_flight)
        return result

    def _check_use(self, uses: list[tuple[torch.Tensor, bool]], group: str) -> None:
        """Launches on one group come one after another; gloo's threads would not wait."""
        for earlier in works.check_use(uses, group):
            if earlier.launch is not self._batch:
                self._finish(earlier)

    def _finish(self, in_flight: InFlight) -> None:
        if in_flight.is_finished or self._peers is None:
            return
        self._peers.wait_for(in_flight.launch)
        self._wait(in_flight.work)
        in_flight.is_finished = True

    # -- what is put in PyTorch's place ------------------------------------------------------------

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, name, replacement) of all that a rehearsal watches."""
        process_groups.hide_private_methods()
        register_optimizer_step_pre_hook(lambda *args: end_of_step())
        yield torch.nn.Module, "cuda", lambda module, device=None: module._apply(lambda t: t.cuda())
        yield torch.Tensor, "__reduce_ex__", pickling(torch.Tensor.__reduce_ex__)
        for owner in (torch.cuda, NoStream):
            yield owner, "synchronize", lambda *args: waits_for_device("synchronize")
        yield _C.Work, "wait", self._waiting()
        for name in ("is_completed", "synchronize"):
            yield _C.Work, name, _ends_flight(getattr(_C.Work, name))
        yield _C.Work, "get_future", _giving_future(_C.Work.get_future)
        for name in ("wait", "value", "then", "add_done_callback"):
            original = getattr(torch._C.Future, name)
            yield torch._C.Future, name, self._through_future(original, waits=name == "wait")
        for module in (dist, distributed_c10d):
            yield module, "new_group", self._new_group  # ``making_nccl_groups`` knows "nccl"
            for name, around in (
                ("init_process_group", self._connecting),
                ("destroy_process_group", self._destroying),
                ("batch_isend_irecv", self._batching),
            ):
                yield module, name, around(getattr(distributed_c10d, name))
        for name, made_by in (
            ("_new_process_group_helper", process_groups.making_nccl_groups),
            ("_get_object_coll_device", process_groups.object_device),
        ):
            yield distributed_c10d, name, made_by(getattr(distributed_c10d, name))
        yield HyperCommGrid, "create_pg", process_groups.describing_grids(HyperCommGrid.create_pg)

    def _waiting(self) -> Callable[..., Any]:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            in_flight = works.waited_for(work)
            if in_flight is not None and self._peers is not None:
                if in_flight.is_finished:
                    return True
                self._peers.wait_for(in_flight.launch)
            elif works.is_finished(work):
                return True
            return self._wait(work, *args, **kwargs)

        return wait

    def _through_future(self, original: Callable[..., Any], waits: bool) -> Callable[..., Any]:
        def method(future: Any, *args: Any) -> Any:
            in_flight = works.of_future(future)
            if in_flight is not None:
                works.waited_for(in_flight.work)
                if waits and self._peers is not None:
                    self._peers.wait_for(in_flight.launch)
            return original(future, *args)

        return method

    def _connecting(self, init: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(init)
        def init_process_group(*args: Any, device_id: Any = None, **options: Any) -> None:
            process_groups.forget_all()
            init(*args, **options)
            self._peers = Peers.connect()
            self._rank = self._peers.rank

        return init_process_group

    def _destroying(self, destroy: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(destroy)
        def destroy_process_group(group: Any = None) -> None:
            is_world = group is None or group is dist.group.WORLD
            try:
                end_of_step()
                if is_world and self._peers is not None:
                    self._peers.end(process_groups.timeout_of(dist.group.WORLD))
            finally:
                destroy(group)
                if not is_world and isinstance(group, dist.ProcessGroup):
                    process_groups.destroyed(group.group_name)
                elif is_world and self._peers is not None:
                    self._peers.close()
                    self._peers = None
                    process_groups.destroyed(None)

        return destroy_process_group

    def _batching(self, batch_isend_irecv: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(batch_isend_irecv)
        def batched(operations: Any) -> Any:
            group = nccl_group(operations[0].group or dist.group.WORLD) if operations else None
            if group is None or self._peers is None:
                return batch_isend_irecv(operations)
            batch = self._batch = Launch(group, "batch_isend_irecv", self._rank)
            try:
                all_of_them = batch_isend_irecv(operations)
            finally:
                self._batch = None
            self._peers.tell(batch)
            for work in all_of_them if _launches_block() else ():
                self._finish(works.in_flight[id(work)])
            return all_of_them

        return batched


def _quietly(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Around the wait of gloo, which copies its results from the host's memory in there."""

    def waiting(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return wait(*args, **kwargs)

    return waiting


def _ends_flight(original: Callable[..., Any]) -> Callable[..., Any]:
    def method(work: Any) -> Any:
        result = original(work)
        if result is not False:
            works.waited_for(work)
        return result

    return method


def _giving_future(get_future: Callable[..., Any]) -> Callable[..., Any]:
    def method(work: Any) -> Any:
        future = get_future(work)
        in_flight = works.in_flight.get(id(work))
        if in_flight is not None:
            in_flight.futures.append(future)
        return future

    return method


def _launches_block() -> bool:
    return os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"


def _process_group(args: Any) -> Any:
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return _C.ProcessGroup.unbox(value)
    return None


def _uses(operator: Operator, args: Any, kwargs: Any) -> list[tuple[torch.Tensor, bool]]:
    return [
        (tensor, key in operator.written)
        for key, value in (*enumerate(args), *kwargs.items())
        for tensor in tensors_in((value,))
    ]


def _check_sync(operator: Operator, args: Any, kwargs: Any, on_device: bool) -> None:
    """Raise if an operator makes the host wait for the device."""
    if operator.name == "copy_":
        target, source = map(is_on_device, args[:2])
        if target != source and not (len(args) > 2 and args[2]):
            waits_for_device(
                f"a copy from the {'host' if target else 'device'} without non_blocking"
            )
    if not on_device:
        return
    if operator.name in _INDEXES:
        for index in tensors_in((args[_INDEXES[operator.name]],)):
            if index.dtype in (torch.bool, torch.uint8):
                waits_for_device("an index that is a mask")
            if not is_on_device(index):
                waits_for_device("an index in the host's memory")
    # With output_size, repeat_interleave reads nothing.
    if operator.name in _READS and not kwargs.get("output_size"):
        waits_for_device(f"{_READS[operator.name]} of a device tensor")
