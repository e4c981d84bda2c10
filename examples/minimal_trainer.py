"""A complete trainer to copy: torchrun --nproc-per-node 4 examples/minimal_trainer.py [folder]

It learns to foresee the text token that names the kind of the image or sound before it.
"""

import os
import sys

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.utils import get_model_config

from megatron_mimo_coord import (
    MegatronMIMOInfra,
    ModuleParallelism,
    MultiModuleCoordinator,
    init_process_group,
)
from megatron_mimo_coord.cpu import enable_cpu_ranks

LAYOUT = {name: ModuleParallelism() for name in ("vision", "audio", "language")}
LAYOUT["vision"] = ModuleParallelism(data_parallel_size=2)
TOKENS = {"vision": 1, "audio": 2}  # kinds of images are 4 to 7, kinds of sounds 8 to 11
MICRO_BATCH_SIZE, NUM_MICROBATCHES = 8, 2  # samples over all ranks, of which each reads its slice


def draw(seed):
    """The text of a microbatch, [sample, token], the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    what, kinds = torch.randint(4, (2, MICRO_BATCH_SIZE, 5), generator=random)
    return torch.stack((what, (what > 0) * (4 * what + kinds)), dim=2).flatten(1).cuda()


def inputs_of(name, tokens):
    """All images or sounds of some samples, which a loader would read; None if there are none."""
    kinds = tokens.roll(-1, 1)[tokens == TOKENS[name]] % 4
    return {"linear": {"input": torch.eye(4, device="cuda")[kinds]}} if len(kinds) else None


def train(folder, steps):
    """Train until so many steps are taken, from the newest checkpoint on."""
    infra = MegatronMIMOInfra.build(LAYOUT)
    infra.initialize_megatron(seed=1)  # random states, and a buffer that layers share
    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=2)
    config.calculate_per_token_loss, config.pipeline_dtype = True, torch.float32
    config.variable_seq_lengths = True  # the constructor would want settings of MoE along with it
    language = {"config": config, "transformer_layer_spec": get_gpt_layer_local_spec()}
    language |= {"vocab_size": 16, "max_sequence_length": 10, **infra.stage_arguments("language")}
    linear = ModuleSpec(torch.nn.Linear, {"in_features": 4, "out_features": 32})
    groups = {name: {"pg_collection": infra.pg_collections[name]} for name in TOKENS}
    layers, spec = {"encoders": {"linear": linear}}, ModuleSpec(GPTModel, language)
    encoders = {name: ModuleSpec(VisionModalitySubmodules, groups[name], layers) for name in TOKENS}
    mimo = MimoModelConfig(spec, encoders, TOKENS, infra.module_to_grid_map)
    model = MimoModel(mimo, **infra.model_arguments()).cuda()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    infra.wrap_in_ddp(model, ddp, dict.fromkeys(TOKENS, config))  # a Linear has no config

    coordinator = MultiModuleCoordinator(infra, model)
    adam = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True)
    optimizer = coordinator.build_optimizer(adam)
    coordinator.attach(get_model_config(model), optimizer)  # what the schedule reads, not a copy
    communicator = coordinator.build_pipeline_communicator(config)
    coordinator.print_description(MICRO_BATCH_SIZE)

    def forward_step(seeds, model):
        batch, here = draw(next(seeds)), infra.participating_modules
        mine = {n: batch[coordinator.data_parallel_slice(MICRO_BATCH_SIZE, n)] for n in here}
        tokens = mine.get("language", max(mine.values(), key=len))  # of encoders, the longest text
        losses, loss_mask = model(  # with context parallelism this rank's positions of both
            input_ids=tokens,
            position_ids=torch.arange(10, device="cuda").expand_as(tokens),
            labels=tokens.roll(-1, 1),
            loss_mask=(tokens == 1) | (tokens == 2),
            modality_inputs={name: inputs_of(name, mine[name]) for name in TOKENS if name in here},
        )

        def loss_func(losses):
            loss, num_tokens = (losses * loss_mask).sum(), loss_mask.sum().int()
            return loss, num_tokens, {"loss": torch.stack((loss.detach(), num_tokens))}

        return losses, loss_func

    def run(seed, **options):
        losses = schedules.forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(range(seed, seed + NUM_MICROBATCHES)),
            model=[model],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=10,
            micro_batch_size=MICRO_BATCH_SIZE,
            p2p_communicator=communicator,
            pg_collection=coordinator.schedule_pg_collection,
            **options,
        )
        return coordinator.reduce_losses(losses)["loss"]

    done, _ = coordinator.load_checkpoint(folder, optimizer)
    for step in range(done + 1, steps + 1):
        optimizer.zero_grad()
        coordinator.zero_grad_buffer()
        loss = run(NUM_MICROBATCHES * step)
        optimizer.step()
        if step % 10 == 0:
            with coordinator.evaluation():
                held_out = run(1_000_000, forward_only=True)
            coordinator.save_checkpoint(folder, optimizer, step=step)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss:.3f}, held out {held_out:.3f}", flush=True)
    infra.destroy()


if __name__ == "__main__":
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if has_gpus else enable_cpu_ranks()
    init_process_group("nccl" if has_gpus else "gloo")
    train(sys.argv[1] if sys.argv[1:] else "checkpoints", steps=30)
    dist.destroy_process_group()
