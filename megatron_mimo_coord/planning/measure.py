"""Times a model's own matrix products on the device at hand, for ``mimo-plan --costs``.

The only file of this room that needs torch, and only when it is asked. Started by torchrun, it
times a sum over all ranks too.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

ROUNDS = 5
SUMMED = 2**24  # numbers in fp32


def products(sizes: ModuleSizes, language_hidden_size: int) -> Iterator[tuple[float, int, int]]:
    """(times, inputs, outputs) of the products that each token of a forward pass meets.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=16)
        >>> list(products(sizes, 8))
        [(2, 8, 24), (2, 8, 8), (2, 8, 32), (2, 32, 8), (1, 8, 16)]
    """
    hidden, layers = sizes.hidden_size, sizes.num_layers
    experts = sum(map(sizes.has_experts, range(layers)))
    yield layers, hidden, sizes.query_size + 2 * sizes.key_size
    yield layers, sizes.query_size, hidden
    for times, width in (
        (layers - experts, sizes.ffn_hidden_size),
        (experts * sizes.moe_router_topk, sizes.moe_ffn_hidden_size),
        (experts, sizes.moe_shared_expert_intermediate_size or 0),
    ):
        if times and width:
            yield times, hidden, sizes.fc1_outputs * width
            yield times, width, hidden
    if sizes.vocab_size is not None:
        yield 1, hidden, sizes.vocab_size
        return
    if sizes.patch_size:
        yield 1, sizes.patch_size, hidden
    part, between = sizes.output_tokens / sizes.sequence, sizes.projection_hidden_size
    yield part, sizes.merged_size, between or language_hidden_size
    if between:
        yield part, between, language_hidden_size


def measured_costs(sizes: Mapping[str, ModuleSizes]) -> str:
    """A file of costs: forward as it was timed, backward twice as long, and links under torchrun.

    Attention is timed too. The sequence is that of a sample, or of an image.

    Args:
        sizes: of each module.
    """
    import torch
    import torch.distributed as dist

    device, ranks = (
        "cuda" if torch.cuda.is_available() else "cpu",
        int(os.getenv("WORLD_SIZE", "1")),
    )
    if device == "cuda":
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", "0")))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def seconds(work: Callable[[], Any]) -> float:
        times: list[float] = []
        for _ in range(1 + ROUNDS):  # the first warms up
            begin = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return median(times[1:])

    def forward(module: ModuleSizes) -> float:
        def numbers(*shape: int) -> Any:
            return torch.randn(shape, device=device, dtype=dtypes[module.params_dtype])

        def product(inputs: int, outputs: int) -> float:
            left, right = numbers(module.sequence, inputs), numbers(inputs, outputs)
            return seconds(lambda: left @ right)

        heads = numbers(1, module.num_attention_heads, module.sequence, module.kv_channels)
        attend = partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=module.is_language
        )
        every = products(module, sizes[LANGUAGE].hidden_size)
        took = sum(times * product(inputs, outputs) for times, inputs, outputs in every)
        took += module.num_layers * seconds(lambda: attend(heads, heads, heads))
        return took * module.tokens(1) / module.sequence

    lines = []
    for name, module in sizes.items():
        took = forward(module)
        lines += [
            f"[{name}]",
            f"forward_seconds_per_sample = {took:.6g}",
            f"backward_seconds_per_sample = {2 * took:.6g}",
            "",
        ]
    if ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        summed = torch.ones(SUMMED, device=device)
        took = seconds(lambda: dist.all_reduce(summed))
        dist.destroy_process_group()
        rate = 2 * (ranks - 1) / ranks * 4 * SUMMED / took
        lines += ["[cluster]", f"node_bytes_per_second = {rate:.6g}", ""]
    return "\n".join(lines)
