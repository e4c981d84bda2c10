"""Each of NCCL's rules, broken on purpose: the sentence comes on every rank that it concerns."""

import copy
import io
import os
import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import World
from ranks import world as any_world
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from megatron_mimo_coord.cpu import end_of_step, no_host_sync


def world(size: int) -> World:
    return any_world(size, rehearse=True)


def message_of(error: Callable[[], Any]) -> str:
    """What a function raises, as text; empty if it does not."""
    try:
        error()
    except (RuntimeError, AttributeError, ValueError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def device(*size: int, **more: Any) -> torch.Tensor:
    return torch.zeros(size, device="cuda", **more)


# -- what ranks of a group launch ------------------------------------------------------------------


def _host_tensor(rank: int, group: Any) -> None:
    dist.all_reduce(torch.zeros(3) if rank else device(3), group=group)


def _strided(rank: int, group: Any) -> None:
    dist.all_reduce(device(3, 2).t() if rank else device(2, 3), group=group)


def _dtype(rank: int, group: Any) -> None:
    dist.all_reduce(device(3, dtype=(torch.float32, torch.int32)[rank]), group=group)


def _unknown_dtype(rank: int, group: Any) -> None:
    dist.all_reduce(device(3, dtype=torch.int16), group=group)


def _size(rank: int, group: Any) -> None:
    dist.broadcast(device(3 + rank), group_src=0, group=group)


def _reduction(rank: int, group: Any) -> None:
    op = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)[rank]
    dist.all_reduce(device(3), op=op, group=group)


def _root(rank: int, group: Any) -> None:
    dist.broadcast(device(3), group_src=rank, group=group)


def _operation(rank: int, group: Any) -> None:
    if rank:
        dist.all_gather_into_tensor(device(6), device(3), group=group)
    else:
        dist.all_reduce(device(3), group=group)


def _message_size(rank: int, group: Any) -> None:
    if rank:
        dist.recv(device(4), group_src=0, group=group)
    else:
        dist.send(device(3), group_dst=1, group=group)


def _split(rank: int, group: Any) -> None:
    sizes = [1, 2] if rank else [1, 1]
    dist.all_to_all_single(device(3 - (not rank)), device(3), sizes, [2, 1], group=group)


def _crossing(rank: int, group: Any) -> None:
    dist.send(device(3), group_dst=1 - rank, group=group)  # and then a recv


def _order(rank: int, group: Any) -> None:
    first, second = (None, group) if rank else (group, None)
    works = [dist.all_reduce(device(1), group=each, async_op=True) for each in (first, second)]
    for work in works:
        work.wait()


def _bitwise(rank: int, group: Any) -> None:
    op = (dist.ReduceOp.BAND, dist.ReduceOp.BXOR)[rank]
    dist.all_reduce(device(3, dtype=torch.int32), op=op, group=group)


def _any_source(rank: int, group: Any) -> None:
    if rank:
        dist.recv(device(3), None, group=group)
    else:
        dist.send(device(3), group_dst=1, group=group)


def _format(rank: int, group: Any) -> None:
    image = device(2, 3, 4, 4)
    dist.all_reduce(image.to(memory_format=torch.channels_last) if rank else image, group=group)


BROKEN = {
    _host_tensor: r"shape \(3,\) and dtype float32 is in the host's memory",
    _strided: r"shape \(2, 3\) and dtype float32 is not contiguous",
    _dtype: r"dtype differs: rank (0|1) launches all_reduce .*float32.* and rank (0|1) launches .*int32",
    _unknown_dtype: r"NCCL does not know this dtype",
    _size: r"elements differs: .*broadcast .*elements 3.*broadcast .*elements 4",
    _bitwise: r"NCCL has no reduction B(AND|XOR)",
    _any_source: r"rank 1 launches recv from any rank .*rank 0 waits for it",
    _format: r"elements differs: .*elements 96[^ ].*elements 96 channels_last",
    _reduction: r"reduction differs: .*SUM.*AVG",
    _root: r"root differs: .*root rank 0.*root rank 1",
    _operation: r"the operations differ: .*all_reduce.* all_gather_into_tensor",
    _message_size: r"what is sent is not what is taken: .*sends 3 float32.*takes 4 float32",
    _split: r"what is sent is not what is taken: ",
    _crossing: r"put sends and receives that cross into one batch_isend_irecv",
    _order: r"all_reduce .*on the world.*all_reduce .*on the group of _order.*must launch on them in one order",
}


def _break_all() -> list[str]:
    """Each on a group of its own: gloo waits on it for ever. Then the world is worth nothing."""
    rank = dist.get_rank()
    return [
        message_of(
            lambda broken=broken: broken(
                rank, dist.new_group([0, 1], group_desc=f"the group of {broken.__name__}")
            )
        )
        for broken in BROKEN
    ]


def test_ranks_that_launch_together_launch_the_same():
    try:
        answers = world(2).run(_break_all)
    finally:
        world(2).kill()
    for broken, *messages in zip(BROKEN, *answers, strict=True):
        for message in messages:
            # Either rank may be named first.
            parts = BROKEN[broken].split(".*")
            assert all(re.search(part, message) for part in parts), (broken, message)
            assert "test_rehearsal.py:" in message, "the line"
            assert "rank 0" in message and "rank 1" in message
    # Only rank 1 had the tensor; rank 0 hears why it waits in vain.
    assert answers[0][0].startswith("RuntimeError: rank 1 stopped: ")


def _fine_together() -> dict[str, str]:
    """What NCCL takes; each on a group of its own."""
    rank = dist.get_rank()
    image = device(2, 3, 4, 4).add(rank).to(memory_format=torch.channels_last)
    total = device(3) + 2 * rank

    def average_twice(group: Any) -> None:
        options: dict[str, Any] = {"op": dist.ReduceOp.AVG, "group": group, "async_op": True}
        for work in [dist.all_reduce(total, **options) for _ in range(2)]:
            work.wait()
        end_of_step()
        assert total.tolist() == [1.0] * 3

    def pass_on(group: Any) -> None:
        tensors = device(3) + 1, device(3) + 2
        for tag, tensor in enumerate(tensors):
            if rank:
                dist.recv(tensor.zero_(), group_src=0, group=group, tag=5 - tag)
            else:
                dist.send(tensor, group_dst=1, group=group, tag=tag)
        assert [tensor[0].item() for tensor in tensors] == [1.0, 2.0]

    def reduce_images(group: Any) -> None:
        dist.all_reduce(image, group=group)
        assert (image == 1).all()

    fine = (reduce_images, average_twice, pass_on)
    seconds = timedelta(seconds=30)
    return {
        each.__name__: message_of(
            lambda each=each: each(dist.new_group([0, 1], seconds, "nccl", None))
        )
        for each in fine
    }


def test_ranks_may_launch_what_nccl_takes():
    for answers in world(2).run(_fine_together):
        assert not any(answers.values()), answers


def _made_for_nccl() -> list[str]:
    groups = (dist.new_group(backend="nccl"), dist.new_group([0], None, "nccl", None))
    return [message_of(lambda g=each: dist.all_reduce(torch.zeros(3), group=g)) for each in groups]


def test_a_group_made_for_nccl_is_nccls():
    [messages] = world(1).run(_made_for_nccl)
    assert all("host's memory" in message for message in messages)


# -- waiting for ever ------------------------------------------------------------------------------


def _in_a_ring(blocking: bool) -> str:
    """Each pair of ranks shares one group; on GPUs this runs, but not with blocking launches."""
    rank = dist.get_rank()
    pairs = {ranks: dist.new_group(ranks) for ranks in ((0, 1), (1, 2), (0, 2))}
    mine = {0: ((0, 1), (0, 2)), 1: ((1, 2), (0, 1)), 2: ((0, 2), (1, 2))}[rank]
    os.environ["CUDA_LAUNCH_BLOCKING"] = str(int(blocking))

    def launch() -> None:
        for work in [dist.all_reduce(device(1), group=pairs[p], async_op=True) for p in mine]:
            work.wait()

    message = message_of(launch)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "0"
    return message


def test_no_rank_waits_for_ever_with_blocking_launches():
    assert world(3).run(_in_a_ring, False) == [""] * 3
    try:
        answers = world(3).run(_in_a_ring, True)
    finally:
        world(3).kill()
    for message in answers:
        assert "wait for each other for ever" in message or "stopped: ranks" in message
        assert all(f"rank {a} waits in all_reduce" in message for a in range(3))


def _batched_and_blocking() -> list[float]:
    """Sends and receives in one batch are launched together, even then."""
    rank, got = dist.get_rank(), device(3)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    operations = [
        dist.P2POp(dist.isend, device(3) + rank, 1 - rank),
        dist.P2POp(dist.irecv, got, 1 - rank),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    dist.all_reduce(got)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "0"
    end_of_step()
    return got.tolist()


def test_a_batch_is_one_launch():
    assert world(2).run(_batched_and_blocking) == [[1.0] * 3] * 2


def _waited_for_two_steps_later() -> list[float]:
    """A send that blocked is waited for when the rehearsal has long forgotten it."""
    rank, got = dist.get_rank(), device(2)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    operations = [
        dist.P2POp(dist.isend, device(2) + 3 + rank, 1 - rank),
        dist.P2POp(dist.irecv, got, 1 - rank),
    ]
    under_way = dist.batch_isend_irecv(operations)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "0"
    for _ in range(3):
        end_of_step()
    for work in under_way:
        work.wait()
    return got.tolist()


def test_a_blocking_send_may_be_waited_for_late():
    assert world(2).run(_waited_for_two_steps_later) == [[4.0] * 2, [3.0] * 2]


def _one_ends() -> None:
    if dist.get_rank() == 1:
        raise KeyError("something else")
    dist.all_reduce(device(1))


def test_a_rank_that_ends_is_named():
    _, errors = world(2).try_run(_one_ends)
    assert errors[1][0] == "KeyError"
    assert (
        "rank 0 waits in all_reduce" in errors[0][1] and "rank 1, which has ended" in errors[0][1]
    )


def _launched_alone() -> list[str]:
    """Nobody waits for it; and what is left of the world is none."""
    group = dist.new_group()
    for _ in range(2):
        dist.all_reduce(device(1), group=group)
    if dist.get_rank() == 0:
        dist.all_reduce(device(1), async_op=True)
    told = message_of(dist.destroy_process_group)
    return [told, message_of(lambda: group.allreduce([device(1)]).wait())]


def test_a_launch_of_one_rank_alone_is_told_in_the_end():
    try:
        answers = world(2).run(_launched_alone)
    finally:
        world(2).kill()
    for rank, (told, by_group) in enumerate(answers):
        if rank == 0 or told:  # rank 1 may be gone before it hears of the launch
            assert re.search(r"rank 0 launched all_reduce .*, and rank 1 never did", told)
        assert re.search(rf"rank {rank} launches .* was destroyed before; .*waits for it", by_group)


# -- on one rank -----------------------------------------------------------------------------------


def _read(tensor: torch.Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "item": tensor[0].item,
        "tolist": tensor.tolist,
        "bool": lambda: bool(tensor[0]),
        "float": lambda: float(tensor[0]),
        "int": lambda: int(tensor[0]),
        "format": lambda: f"{tensor[0]}",
        "format all": lambda: f"{tensor}",
        "repr": lambda: repr(tensor),
        "cpu": tensor.cpu,
        "to": lambda: tensor.to("cpu"),
        "numpy": tensor.numpy,
        "nonzero": tensor.nonzero,
        "mask": lambda: tensor[tensor > 0],
        "equal": lambda: torch.equal(tensor, tensor),
        "copy to the host": lambda: torch.zeros(3).copy_(tensor),
        "synchronize": torch.cuda.synchronize,
        "event": torch.cuda.Event().synchronize,
        "stream": torch.cuda.current_stream().synchronize,
        "copy to the device": lambda: torch.tensor([1.0], device="cuda"),
        "allclose": lambda: torch.allclose(tensor, tensor),
        "numpy's asarray": lambda: np.asarray(tensor),
        "pickle": lambda: pickle.dumps(tensor),
        "save": lambda: torch.save({"tensor": tensor}, io.BytesIO()),
        "index of a list": lambda: tensor[[0, 1]],
        "index on the host": lambda: tensor[torch.tensor([0, 1])],
        "set by a list": lambda: tensor.clone().__setitem__([0, 1], 1.0),
        "set by an index on the host": lambda: tensor.clone().__setitem__([0, 1], tensor[:2]),
        "repeat": lambda: tensor.repeat_interleave(tensor.long()),
        "split": lambda: tensor.tensor_split(tensor[:1].long()),
        "one hot of unknown classes": lambda: one_hot(tensor.long()),
        "barrier": dist.barrier,
    }


def _fine(tensor: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What a GPU does without a wait."""
    number = torch.zeros(3)
    return {
        "of a host tensor": lambda: (number[0].item(), number.tolist(), f"{number}"),
        "host index": lambda: (number.nonzero(), number[number > 0], number[[0, 1]]),
        "to where it is": lambda: (tensor + 1).sum().to("cuda"),
        "copy on the device": lambda: tensor.clone().copy_(tensor),
        "cuda": lambda: number.cuda(non_blocking=True),
        "cuda by place": lambda: number.cuda(None, True),
        "to": lambda: number.to("cuda", non_blocking=True),
        "to by place": lambda: number.to("cuda", torch.float16, True),
        "to with dtype by place": lambda: number.to(tensor, True),
        "to the host": lambda: tensor.to("cpu", non_blocking=True),
        "copy to the host": lambda: torch.zeros(3).copy_(tensor, non_blocking=True),
        "copy to the device": lambda: tensor.clone().copy_(number, non_blocking=True),
        "as tensor": lambda: torch.as_tensor(tensor, device="cuda"),
        "one hot": lambda: one_hot(tensor.long(), 3),
        "one hot by name": lambda: one_hot(tensor.long(), num_classes=3),
        "deep copy": lambda: copy.deepcopy({"tensor": tensor}),
        "shallow copy": lambda: copy.copy(tensor),
        "padded": lambda: pad_sequence([tensor, tensor[:1]]),
        "index": lambda: (tensor[tensor.long()], tensor[1], tensor[:2], tensor[None], tensor[True]),
        "set": lambda: tensor.clone().__setitem__(tensor.long(), 1.0),
        "set by a mask": lambda: tensor.clone().__setitem__(tensor > 0, 1.0),
        "repeat": lambda: tensor.repeat_interleave(tensor.long() + 1, output_size=3),
        "repeat alike": lambda: tensor.repeat_interleave(2),
        "pickle": lambda: pickle.dumps(number),
    }


def _sync() -> dict[str, str]:
    tensor = device(3)
    assert not any(message_of(read) for read in _read(tensor).values()), "outside all is well"
    with no_host_sync():
        refused = {name: message_of(fine) for name, fine in _fine(tensor).items()}
        assert not any(refused.values()), refused
        return {name: message_of(read) for name, read in _read(tensor).items()}


def _marks() -> list[bool]:
    """Which of these a group takes."""
    made = device(4)
    host = torch.zeros(4)
    leaf = device(4, requires_grad=True)
    (leaf * 2).sum().backward()
    layer = torch.nn.Linear(2, 2)
    moved = torch.nn.Linear(2, 2).cuda()
    tensors = {
        "made": made,
        "on the same device": torch.zeros(4, device=made.device),
        "current": torch.zeros(4, device=torch.cuda.current_device()),
        "moved": host.cuda(),
        "moved by to": host.to("cuda", torch.float16),
        "like another": host.to(made),
        "computed": (made + 1).view(2, 2)[1] * 2,
        "new": made.new_zeros(4),
        "like": torch.ones_like(made),
        "gradient": leaf.grad,
        "of a list": torch.tensor([1.0], device="cuda"),
        "of the same": made.new_tensor([1.0]),
        "one hot": one_hot(made.long(), 3),
        "of a user's operator": _twice(made),
        "by name": _twice(x=made),
        "padded": pad_sequence([made, made[:2]]),
        "deep copy": copy.deepcopy(made),
        "from sparse": made.to_sparse().to_dense(),
        "from rows": made.view(2, 2).to_sparse_csr().to_dense(),
        "without gradient": _gradient_of_nothing(),
        "checkpointed": _gradient_through(partial(checkpoint, torch.exp, use_reentrant=False)),
        "saved on the host": _gradient_through(_exp_saved_on_the_host),
        "module": moved.weight.data,
    }
    hosts = {
        "host": host,
        "copied": made.cpu(),
        "copied by to": made.to("cpu"),
        "like on the host": torch.ones_like(made, device="cpu"),
        "of a host list": torch.tensor([1.0]),
        "host module": layer.weight.data,
        "filled from the device": torch.zeros(4).copy_(made),
        "made in backward": _made_in_backward(),
        "of device numbers": torch.tensor([made[0], made[1]]),
    }
    taken = {name: message_of(lambda t=t: dist.all_reduce(t)) for name, t in tensors.items()}
    assert not any(taken.values()), taken
    taken = {name: message_of(lambda t=t: dist.all_reduce(t)) for name, t in hosts.items()}
    assert all("host's memory" in message for message in taken.values()), taken
    assert _moved_from_an_edge(made) is made, "what is there is not copied"
    dist.all_reduce(host, group=dist.new_group(backend="gloo"))
    names: list[Any] = [None]
    dist.all_gather_object(names, "PyTorch puts them where the group wants them")
    return [bool(names[0])]


@torch.library.custom_op("rehearsal_test::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class _Second(torch.autograd.Function):
    """Backward is given a gradient for an output that nobody used."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
        return nothing


def _gradient_of_nothing() -> Any:
    leaf = device(4, requires_grad=True)
    _Second.apply(leaf)[0].sum().backward()
    return leaf.grad


def _exp_saved_on_the_host(tensor: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return tensor.exp()


def _gradient_through(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    leaf = device(4, requires_grad=True)
    function(leaf * 2).sum().backward()
    return leaf.grad


def _made_in_backward() -> torch.Tensor:
    leaf, made = device(4, requires_grad=True), []
    leaf.register_hook(lambda gradient: made.append(torch.zeros(4)))
    leaf.sum().backward()
    return made[0]


def _moved_from_an_edge(made: torch.Tensor) -> torch.Tensor:
    """To where it is, in a backward from a gradient edge."""
    leaf, moved = device(4, requires_grad=True), []
    leaf.register_hook(lambda gradient: moved.append(made.to("cuda")))
    with no_host_sync():
        torch.autograd.backward(get_gradient_edge(leaf * 2), device(4))
    return moved[0]


def _works() -> list[str]:
    tensor, other = device(8), device(4)
    told = []
    dist.all_reduce(tensor[:4], async_op=True)
    tensor[4:] + 1  # another part
    dist.all_reduce(tensor[4:], async_op=True).wait()
    tensor[4:] + 1
    told.append(message_of(end_of_step))
    tensor[:2] + 1
    told.append(message_of(end_of_step))
    dist.all_gather_into_tensor(device(4), other, async_op=True)
    other + 1  # reads what it reads
    told.append(message_of(end_of_step))
    other.zero_()
    weight = torch.nn.Parameter(device(1))
    weight.grad = device(1)
    told.append(message_of(torch.optim.SGD([weight], lr=1.0).step))
    return [*told, message_of(end_of_step)]


def _works_of_operators_and_futures() -> list[str]:
    tensor, told = device(4), []
    for use in (
        lambda work: torch.add(device(4), 1, out=tensor),
        lambda work: _twice(tensor),
        lambda work: work.get_future() and tensor + 1,
        lambda work: (work.get_future().wait(), tensor + 1),
        lambda work: (work.get_future().then(lambda future: None), tensor + 1),
    ):
        work = dist.all_reduce(tensor, async_op=True)
        use(work)
        told.append(message_of(end_of_step))
        work.wait()
    return told


def _destroyed() -> list[str]:
    """Through its own method and through a function."""
    group = dist.new_group(group_desc="the group of a test")
    dist.destroy_process_group(group)
    return [
        message_of(lambda: group.allreduce([device(1)]).wait()),
        message_of(lambda: dist.all_reduce(device(1), group=group)),
    ]


def _private() -> list[str]:
    names = ("_get_backend", "_set_default_timeout", "_device_types", "_allgather_base")
    host = dist.new_group(backend="gloo")
    assert host._get_backend(torch.device("cpu")).options._timeout
    assert dist.group.WORLD.size() == 1 and dist.group.WORLD.group_name is not None
    return [message_of(lambda name=name: getattr(dist.group.WORLD, name)) for name in names]


def test_reading_a_device_tensor_without_host_sync():
    [messages] = world(1).run(_sync)
    for name, message in messages.items():
        assert re.search(r"rank 0: .* at .*test_rehearsal.py:\d+ makes the host wait", message), (
            name
        )


def test_which_tensors_are_the_devices():
    assert world(1).run(_marks) == [[True]]


def test_a_work_is_waited_for_before_its_tensor_is_used():
    [[fine, used, also_fine, written, nothing]] = world(1).run(_works)
    [[out, operator, future, *waited]] = world(1).run(_works_of_operators_and_futures)
    assert (fine, also_fine, nothing, *waited) == ("",) * 5
    told = ((used, "used"), (written, "written"), (out, "written"), (operator, "used"))
    for message, how in (*told, (future, "used")):
        assert re.search(
            rf"rank 0: nobody waited for .* before its tensor was {how} at .*:\d+", message
        )


def test_a_group_is_not_used_after_it_was_destroyed():
    [[direct, by_function]] = world(1).run(_destroyed)
    assert "the group of a test" in direct and "was destroyed before" in direct
    assert by_function


def test_only_public_names_of_a_process_group_exist():
    [messages] = world(1).run(_private)
    for message in messages:
        assert message.startswith("AttributeError: ProcessGroup._") and "the world" in message
