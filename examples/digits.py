"""Handwritten digits to read: patches of an image in, the digit's name letter by letter out.

A sample is one sequence: an image token for each patch, a separator, then the letters of the name
and an end token. Which sample comes when depends on the seed alone, so that every rank of every
layout can make the same batches and take its share of each.
"""

import string
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from attrs import frozen
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = string.ascii_lowercase  # token 0 is "a"
END, SEPARATOR, IMAGE = 26, 27, 28
VOCABULARY = 32  # the tokens above, padded so that a tensor-parallel size of up to 32 divides it

PIXELS, PATCH = 8, 4  # edge of an image and of a patch
PATCHES, PATCH_DIM = (PIXELS // PATCH) ** 2, PATCH**2
PROMPT = [IMAGE] * PATCHES + [SEPARATOR]
NAME_LENGTH = max(map(len, NAMES)) + 1  # with the end token
SEQUENCE = PATCHES + NAME_LENGTH  # the last token of all is only ever a label

HELD_OUT = 360


@frozen
class Batch:
    """Samples of all ranks: ``images`` [b, patch, number], the others [b, s].

    ``labels`` and ``loss_mask`` are None where there is nothing to learn, only to read.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None


@frozen
class Digits:
    """Images [n, 8, 8] with ink between 0 and 1, and which digit each is."""

    images: torch.Tensor
    digits: torch.Tensor

    def accuracy(self, words: Sequence[str]) -> float:
        """Share of the images whose name is spelled right."""
        names = [NAMES[digit] for digit in self.digits.tolist()]
        return sum(map(str.__eq__, words, names)) / len(names)


def load() -> tuple[Digits, Digits]:
    """The digits to learn from, and those held out: the same split whatever the seed."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32, device="cuda") / found.images.max()
    digits = torch.tensor(found.target, device="cuda")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).to("cuda")
    learn, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return Digits(images[learn], digits[learn]), Digits(images[held_out], digits[held_out])


def training_batches(digits: Digits, micro_batch_size: int, seed: int) -> Iterator[Batch]:
    """Microbatches without end, each image shifted by up to one pixel either way."""
    generator = torch.Generator().manual_seed(seed)
    order = _order(len(digits.digits), generator)
    margins = torch.nn.functional.pad(digits.images, (1, 1, 1, 1))
    shifted = margins.unfold(1, PIXELS, 1).unfold(2, PIXELS, 1)  # [n, down, right, 8, 8]
    names, masks = _names_as_tokens()
    prompt = torch.tensor(PROMPT, device="cuda").expand(micro_batch_size, -1)
    while True:
        chosen = torch.tensor(list(islice(order, micro_batch_size))).to("cuda")
        down, right = torch.randint(3, (2, micro_batch_size), generator=generator).to("cuda")
        name, mask = names[digits.digits[chosen]], masks[digits.digits[chosen]]
        nothing = torch.zeros_like(prompt[:, :-1])  # image tokens have no label
        yield Batch(
            images=patches(shifted[chosen, down, right]),
            tokens=torch.cat((prompt, name[:, :-1]), dim=1),
            labels=torch.cat((nothing, name), dim=1),
            loss_mask=torch.cat((nothing.float(), mask), dim=1),
        )


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _names_as_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """For each digit its letters and end token, padded, and a mask that leaves the padding out."""
    names = torch.full((len(NAMES), NAME_LENGTH), END, device="cuda")
    masks = torch.zeros((len(NAMES), NAME_LENGTH), device="cuda")
    for digit, name in enumerate(NAMES):
        letters = [LETTERS.index(letter) for letter in name]
        names[digit, : len(letters)] = torch.tensor(letters, device="cuda")
        masks[digit, : len(letters) + 1] = 1.0
    return names, masks


def patches(images: torch.Tensor) -> torch.Tensor:
    """Cut images [b, 8, 8] into patches [b, patch, number]."""
    rows = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return rows.reshape(len(images), PATCHES, PATCH_DIM)


def spelled(tokens: Sequence[int]) -> str:
    """The word that generated tokens spell, up to the end token."""
    return "".join(LETTERS[token] for token in tokens[: [*tokens, END].index(END)])


def drawn(image: torch.Tensor) -> str:
    """An image as text, two characters a pixel."""
    shades = " ░▒▓█"
    levels = (image * (len(shades) - 1)).round().long().tolist()
    return "\n".join("".join(shades[level] * 2 for level in row) for row in levels)
