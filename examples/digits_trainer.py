"""The trainer of train_digits_vlm.py: what a Megatron training script does with a coordinator."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import checkpoint
import torch
import torch.distributed as dist
from attrs import field, frozen
from context_attention import positions
from digits import (
    END,
    IMAGE,
    PATCH_DIM,
    PATCHES,
    VOCABULARY,
    Batch,
    Digits,
    blank,
    on_device,
    pages_of,
    patches,
    sequence_length,
    training_batches,
    words,
)
from digits_options import HEADS, VISION, parallelism
from job import stop_ranks
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_model_config
from vlm import LANGUAGE, EncoderShape, LanguageShape, ModelShape, build_model

from megatron_mimo_coord import MegatronMIMOInfra, MultiModuleCoordinator

HIDDEN = 64  # of either module


@frozen
class Trainer:
    """What a step needs: the model, and who coordinates, connects and updates it.

    ``loads`` takes the images of each of the encoder's data-parallel ranks, microbatch by
    microbatch.
    """

    model: MimoModel
    infra: MegatronMIMOInfra
    coordinator: MultiModuleCoordinator
    communicator: MultiModulePipelineCommunicator
    optimizer: MimoOptimizer
    options: Namespace
    loads: list[Sequence[float]] = field(factory=list)

    @classmethod
    def build(cls, options: Namespace) -> "Trainer":
        """Grids, model, coordinator and optimizer, in the order in which they need each other."""
        infra = MegatronMIMOInfra.build(parallelism(options))
        infra.initialize_megatron(options.seed)
        model = build_model(model_shape(options), infra.module_to_grid_map, infra.pg_collections)
        coordinator = MultiModuleCoordinator(infra, model)
        optimizer = coordinator.build_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                adam_beta2=0.95,  # a short training has no time to remember longer
                clip_grad=1.0,
                use_distributed_optimizer=options.distributed_optimizer,
            )
        )
        config = get_model_config(model)
        coordinator.attach(config, optimizer)
        communicator = coordinator.build_pipeline_communicator(config)
        return cls(model, infra, coordinator, communicator, optimizer, options)

    def destroy(self) -> None:
        """Give all process groups back, those of the world included."""
        self.model.destroy()
        self.infra.destroy()
        stop_ranks()

    # -- learning ----------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], num_microbatches: int) -> tuple[float, float | None]:
        """One optimizer step; the loss, and the norm of its gradient before clipping.

        The norm is None where the gradient was not finite, and the weights stayed as they were.
        """
        self.optimizer.zero_grad()
        self.coordinator.zero_grad_buffer()
        losses = self._run_schedule(self._forward_losses, batches, num_microbatches)
        _, grad_norm, _ = self.optimizer.step()
        return self.coordinator.reduce_losses(losses)["loss"], grad_norm

    def _forward_losses(self, batches: Iterator[Batch], model: MimoModel) -> tuple[Any, Any]:
        """Forward of one microbatch, and what to make of its output on the last stage."""
        batch = next(batches)
        share = self._share_of_text()
        labels, loss_mask = batch.labels[share], batch.loss_mask[share]
        # With context parallelism this rank's positions of both come back.
        output, loss_mask = self._forward(batch, model, labels=labels, loss_mask=loss_mask)

        def loss_func(
            losses: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss, num_tokens = (losses * loss_mask).sum(), loss_mask.sum()
            return loss, num_tokens.int(), {"loss": torch.stack((loss.detach(), num_tokens))}

        return output, loss_func

    # -- reading -----------------------------------------------------------------------------------

    def read(self, images: torch.Tensor) -> list[str]:
        """What the model reads in images [n, 8, 8]: each token takes one pass over all of them."""
        most, size = self.options.images_per_sample, self.options.micro_batch_size
        pages = list(pages_of(iter(range(len(images))), most, seed=0))
        filled = [pages[i % len(pages)] for i in range(math.ceil(len(pages) / size) * size)]
        texts, places = zip(*(blank(len(page), most) for page in filled), strict=True)
        answers: list[list[int]] = [[] for _ in filled]
        cut = patches(images)
        for turn in range(max(map(len, places))):
            # A sample that has no such place is asked for its first token, which is not used.
            asked = [each[turn] - 1 if turn < len(each) else 0 for each in places]
            letters = self._next_letters(filled, cut, texts, asked)
            for text, places_here, answer, letter in zip(
                texts, places, answers, letters, strict=True
            ):
                if turn < len(places_here):
                    text[places_here[turn]] = letter
                    answer.append(letter)
            if most == 1 and all(END in answer for answer in answers):
                break  # every name is spelled to its end
        return [word for answer in answers[: len(pages)] for word in words(answer, most)]

    @torch.no_grad()
    def _next_letters(
        self,
        pages: Sequence[Sequence[int]],
        images: torch.Tensor,
        texts: Sequence[Sequence[int]],
        asked: Sequence[int],
    ) -> list[int]:
        """The likeliest token behind the asked place of each sample, on every rank."""
        size = self.options.micro_batch_size
        batches = []
        for start in range(0, len(pages), size):
            part = slice(start, start + size)
            numbers = [image for page in pages[part] for image in page]
            tokens = on_device([text[:-1] for text in texts[part]])
            chosen = images[on_device(numbers)]
            batches.append(Batch(pages[part], chosen, tokens, on_device(asked[part])))
        found = self._run_schedule(self._forward_letters, iter(batches), len(batches), reading=True)
        # Every sample has one rank that knows its letter, so a sum over the world tells all ranks.
        letters = torch.zeros((len(batches), size), dtype=torch.long, device="cuda")
        if found and self.infra.pg_collections[LANGUAGE].tp.rank() == 0:
            share = self.coordinator.data_parallel_slice(size, LANGUAGE)
            letters[:, share] = torch.stack(found)
        dist.all_reduce(letters)
        return letters.flatten().tolist()

    def _forward_letters(self, batches: Iterator[Batch], model: MimoModel) -> tuple[Any, Any]:
        """Forward of one microbatch whose next letters are asked for."""
        batch = next(batches)
        asked = batch.asked[self._share_of_text()]
        output, _ = self._forward(batch, model)

        def likeliest(logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            groups = self.infra.pg_collections[LANGUAGE]
            here = positions(batch.tokens.shape[1], groups.cp.rank(), groups.cp.size())
            is_asked = here.to("cuda") == asked[:, None]
            last = (logits * is_asked[..., None]).sum(1)
            last = gather_from_tensor_model_parallel_region(last, group=groups.tp)
            likely = last[:, : END + 1].argmax(dim=-1)  # a letter or the end, nothing else
            return likely * is_asked.any(1)  # else another context-parallel rank knows it

        return output, likeliest

    # -- both --------------------------------------------------------------------------------------

    def _run_schedule(
        self,
        forward_step: Callable[..., Any],
        batches: Iterator[Batch],
        num_microbatches: int,
        reading: bool = False,
    ) -> list[Any]:
        """Megatron's schedule, on every layout; encoders on its ranks run before and after it."""
        return self.coordinator.forward_backward_func(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=num_microbatches,
            # An upper bound: ranks tell each other the shapes that they send.
            seq_length=sequence_length(self.options.images_per_sample),
            micro_batch_size=self.options.micro_batch_size,
            forward_only=reading,
            collect_non_loss_data=reading,
            p2p_communicator=self.communicator,
            pg_collection=self.coordinator.schedule_pg_collection,
        )

    def _forward(self, batch: Batch, model: MimoModel, **targets: Any) -> tuple[Any, Any]:
        """The modules on this rank, each with its share of the microbatch."""
        tokens = batch.tokens[self._share_of_text()]
        images = batch.images_at(self._images_here(batch))
        inputs = {VISION: {"images": images}} if len(images) else None
        positions = torch.arange(tokens.shape[1]).to("cuda").expand_as(tokens)
        return model(input_ids=tokens, position_ids=positions, modality_inputs=inputs, **targets)

    def _images_here(self, batch: Batch) -> Sequence[tuple[int, int]]:
        """(sample, image) of what the encoder on this rank is fed: by cost, or of its samples."""
        counts = [len(page) for page in batch.pages]
        if self.options.assign:
            assignment = self.coordinator.assign_images(
                VISION,
                [[PATCHES] * count for count in counts],
                sample_ids=[str(page) for page in batch.pages],
            )
            self.loads.append(assignment.loads)
            return assignment.local
        dp = self.infra.module_to_grid_map[VISION]
        size = dp.shape[dp.dim_names.index("dp")]
        share = len(counts) // size
        self.loads.append([PATCHES * sum(counts[i * share : (i + 1) * share]) for i in range(size)])
        if VISION not in self.infra.participating_modules:
            return ()
        samples = range(len(counts))[self.coordinator.data_parallel_slice(len(counts), VISION)]
        return [(sample, image) for sample in samples for image in range(counts[sample])]

    def _share_of_text(self) -> slice:
        """Samples whose text this rank reads; an encoder on its own counts their image tokens."""
        module = LANGUAGE if LANGUAGE in self.infra.participating_modules else VISION
        return self.coordinator.data_parallel_slice(self.options.micro_batch_size, module)


def model_shape(options: Namespace) -> ModelShape:
    """Both modules as the options want them, at one width."""
    ddp = {
        "use_distributed_optimizer": options.distributed_optimizer,
        "overlap_grad_reduce": options.overlap_grad_reduce,
    }
    vision = EncoderShape(
        patches=PATCHES,
        patch_dim=PATCH_DIM,
        token_id=IMAGE,
        layers=options.vision_layers,
        hidden=HIDDEN,
        heads=HEADS,
    )
    language = LanguageShape(
        vocabulary=VOCABULARY,
        sequence=sequence_length(options.images_per_sample),
        layers=options.language_layers,
        hidden=HIDDEN,
        heads=HEADS,
    )
    return ModelShape(
        encoders={VISION: vision},
        language=language,
        per_token=dict.fromkeys((VISION, LANGUAGE), options.loss == "per-token"),
        ddp=dict.fromkeys((VISION, LANGUAGE), ddp),
    )


@frozen
class Progress:
    """How training stands after a step.

    ``accuracy`` is None where nothing was read, ``grad_norm`` where the step was skipped.
    ``imbalance`` is largest / mean work of the encoder's ranks, on average over the microbatches.
    """

    step: int
    loss: float
    grad_norm: float | None
    images_per_second: float
    seconds_left: float
    accuracy: float | None
    imbalance: float = 1.0


def train(
    trainer: Trainer, learn: Digits, held_out: Digits, options: Namespace, done: int
) -> Iterator[Progress]:
    """Take all steps after the first ``done``, and tell after each how training stands."""
    num_microbatches = options.global_batch_size // options.micro_batch_size
    most = options.images_per_sample
    batches = training_batches(learn, options.micro_batch_size, options.seed, most)
    batches = islice(batches, done * num_microbatches, None)
    start, images = time.perf_counter(), 0.0
    saved = None
    for step in range(done + 1, options.steps + 1):
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        trainer.loads.clear()
        loss, grad_norm = trainer.step(batches, num_microbatches)
        images += sum(map(sum, trainer.loads)) / PATCHES
        imbalances = [max(load) * len(load) / sum(load) for load in trainer.loads if sum(load)]
        accuracy = None
        if options.eval_interval and step % options.eval_interval == 0:
            accuracy = held_out.accuracy(trainer.read(held_out.images))
        seconds = (time.perf_counter() - start) / (step - done)
        yield Progress(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            images_per_second=images / (time.perf_counter() - start),
            seconds_left=seconds * (options.steps - step),
            accuracy=accuracy,
            imbalance=sum(imbalances) / len(imbalances) if imbalances else 1.0,
        )
        # Only now has the caller logged this step, which a training that goes on from here skips.
        if options.save and (step % options.save_interval == 0 or step == options.steps):
            saved = trainer.coordinator.save_checkpoint(
                options.save,
                trainer.optimizer,
                step=step,
                extra={"settings": checkpoint.settings(options)},
                background=True,
            )
    if saved:
        saved.wait()


def learning_rate(step: int, options: Namespace) -> float:
    """Linear warmup over a tenth of the steps, then a cosine down to a hundredth."""
    warmup = max(1, options.steps // 10)
    if step <= warmup:
        return options.lr * step / warmup
    done = (step - warmup) / (options.steps - warmup)
    return options.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
