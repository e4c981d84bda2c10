"""Times a model's own layers on the device at hand, for ``mimo-plan --costs``.

The only file of this room that needs torch, and only when it is asked. Started by torchrun, it
times sums over all ranks too.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.toml_tables import table_text
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.costs_file import CLUSTER
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.parameters import layers_parameters

ROUNDS = 5
SUMMED = 2**21  # numbers in fp32
SUMS = 64  # in a row, each behind a product, as in a step


def products(sizes: ModuleSizes, language_hidden_size: int) -> dict[tuple[int, int], float]:
    """(inputs, outputs) of the products of a forward pass, and how often a token meets each.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=16)
        >>> products(sizes, 8)
        {(8, 8): 2.0, (8, 24): 2.0, (8, 32): 2.0, (32, 8): 2.0, (8, 16): 1.0}
    """
    times: dict[tuple[int, int], float] = defaultdict(float)
    for each in layers_parameters(sizes, range(sizes.num_layers), language_hidden_size):
        if each.inputs:
            times[each.inputs, each.numel // each.inputs] += each.uses
    return dict(times)


def measured_costs(sizes: Mapping[str, ModuleSizes]) -> str:
    """A file of costs: forward as it was timed, backward twice as long.

    Timed are matrix products, attention, and norms, dropout and residuals, which TP ranks repeat:
    their part is the replicated share. The sequence is that of a sample, or of an image. Under
    torchrun messages are timed as ranks meet them: sums of one sample's hidden states and of many
    numbers, each behind a product, at which no two ranks arrive together.

    Args:
        sizes: of each module.
    """
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = int(os.getenv("WORLD_SIZE", "1"))
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

    def forward(module: ModuleSizes) -> tuple[float, float]:
        """Seconds of a sample, and the part of them that TP ranks repeat."""

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
        took = sum(times * product(*widths) for widths, times in every.items())
        attending = module.num_layers * seconds(lambda: attend(heads, heads, heads))
        took += attending * module.attended / module.sequence
        hidden, of_token = numbers(module.sequence, module.hidden_size), (module.hidden_size,)
        functions = torch.nn.functional
        norm = functions.rms_norm if module.normalization == "RMSNorm" else functions.layer_norm
        drop = partial(functions.dropout, p=module.hidden_dropout)
        repeated = 2 * module.num_layers * seconds(lambda: hidden + drop(norm(hidden, of_token)))
        took += repeated
        share = 0.0 if module.sequence_parallel else repeated / took
        return took * module.tokens(1) / module.sequence, share

    tables = []
    for name, module in sizes.items():
        took, repeated = forward(module)
        costs = ModuleCosts(
            forward_seconds_per_sample=took,
            backward_seconds_per_sample=2 * took,
            tensor_parallel_replicated_share=repeated,
            measured_seq_length=module.seq_length,
        )
        tables.append(table_text(name, costs))
    if ranks > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        factor, hops = torch.ones((512, 512), device=device), 2 * (ranks - 1)
        few = sizes[LANGUAGE].sequence * sizes[LANGUAGE].hidden_size
        many = max(SUMMED, 4 * few)

        def layers(summed: Any) -> None:
            for _ in range(SUMS):
                factor @ factor
                if summed is not None:
                    dist.all_reduce(summed)

        alone, *summing = (
            seconds(partial(layers, each)) / SUMS
            for each in (None, torch.zeros(few, device=device), torch.zeros(many, device=device))
        )
        dist.destroy_process_group()
        rate = 4 * (many - few) / ranks * hops / (summing[1] - summing[0])
        latency = max(0.0, (summing[0] - alone) / hops - 4 * few / ranks / rate)
        cluster = Cluster(node_latency_seconds=latency, node_bytes_per_second=rate)
        tables.append(table_text(CLUSTER, cluster))
    return "\n".join(tables)
