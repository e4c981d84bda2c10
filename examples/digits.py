"""Handwritten digits to read: patches of an image in, the digit's name letter by letter out.

A sample is one sequence: an image token for each patch, a separator, then the letters of the name
and an end token. Or it is a page of several digits, or none, where the numeral of each image stands
behind its tokens. Which sample comes when depends on the seed alone, so that every rank of every
layout can make the same batches and take its share of each.
"""

import random
import string
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

import torch
from attrs import frozen
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = string.ascii_lowercase  # token 0 is "a"
END, SEPARATOR, IMAGE = 26, 27, 28
VOCABULARY = 32  # the tokens above, padded so that a tensor-parallel size of up to 32 divides it

PIXELS, PATCH = 8, 4  # edge of an image and of a patch
PATCHES, PATCH_DIM = (PIXELS // PATCH) ** 2, PATCH**2
NAME_LENGTH = max(map(len, NAMES)) + 1  # with the end token
SHARED_BY = 4  # chunks of a text that up to two context-parallel ranks can share

HELD_OUT = 360


@frozen
class Batch:
    """Samples of all ranks: ``images`` [image, patch, number] in order, the others [b, s].

    Args:
        pages: for each sample, the images on it by their numbers in the data set: on the host.
        images: of all samples.
        tokens: the text, as far as it is known.
        asked: the place in each sample whose next token is asked for, [b], if none is learned.
        labels: what follows each token, where there is something to learn.
        loss_mask: which of them count.
    """

    pages: Sequence[Sequence[int]]
    images: torch.Tensor
    tokens: torch.Tensor
    asked: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None

    def images_at(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Images by (sample, image)."""
        starts = list(accumulate(map(len, self.pages), initial=0))
        chosen = [starts[sample] + image for sample, image in places]
        return self.images[on_device(chosen)]


def on_device(numbers: Sequence[int]) -> torch.Tensor:
    """Integers of the host, to index with."""
    return torch.tensor(numbers, dtype=torch.long).to("cuda", non_blocking=True)


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


def sequence_length(images_per_sample: int) -> int:
    """Tokens of a sample: of the longest, whose last is only ever a label, and of padding."""
    longest = images_per_sample * (PATCHES + 1)
    if images_per_sample == 1:
        longest = PATCHES + NAME_LENGTH
    return -(-longest // SHARED_BY) * SHARED_BY


def pages_of(images: Iterator[int], most: int, seed: int) -> Iterator[list[int]]:
    """Take images page by page: one each, or a skewed number from none to ``most``, to the end."""
    dice = random.Random(seed)
    while True:
        count = 1 if most == 1 else min(most, int(dice.lognormvariate(0.6, 1.0)))
        page = list(islice(images, count))
        if len(page) < count:
            if page:
                yield page
            return
        yield page


def blank(images: int, images_per_sample: int) -> tuple[list[int], list[int]]:
    """The text of a sample before anything is read, and the places where answers are written."""
    if images_per_sample == 1:
        text = [IMAGE] * PATCHES + [SEPARATOR]
        places = list(range(len(text), len(text) + NAME_LENGTH))
    else:
        text = [SEPARATOR] + ([IMAGE] * PATCHES + [SEPARATOR]) * images
        places = list(range(PATCHES + 1, len(text), PATCHES + 1))
    return text + [END] * (sequence_length(images_per_sample) + 1 - len(text)), places


def answer(digits: Sequence[int], images_per_sample: int) -> list[int]:
    """What belongs there: the letters of the one digit's name and an end token, or numerals."""
    if images_per_sample > 1:  # the first letters stand for numerals
        return list(digits)
    return [*map(LETTERS.index, NAMES[digits[0]]), END]


def training_batches(
    digits: Digits, micro_batch_size: int, seed: int, images_per_sample: int = 1
) -> Iterator[Batch]:
    """Microbatches without end, each image shifted by up to one pixel either way."""
    generator = torch.Generator().manual_seed(seed)
    order = _order(len(digits.digits), generator)
    margins = torch.nn.functional.pad(digits.images, (1, 1, 1, 1))
    shifted = margins.unfold(1, PIXELS, 1).unfold(2, PIXELS, 1)  # [n, down, right, 8, 8]
    truth = digits.digits.tolist()
    all_pages = pages_of(order, images_per_sample, seed)
    while True:
        pages = list(islice(all_pages, micro_batch_size))
        chosen = [image for page in pages for image in page]
        down, right = torch.randint(3, (2, len(chosen)), generator=generator).to("cuda")
        tokens, labels, mask = [], [], []
        for page in pages:
            text, places = blank(len(page), images_per_sample)
            label, counts = [0] * len(text), [0.0] * len(text)
            written = answer([truth[image] for image in page], images_per_sample)
            for place, token in zip(places, written, strict=False):
                text[place] = label[place] = token
                counts[place] = 1.0
            tokens.append(text[:-1])
            labels.append(label[1:])
            mask.append(counts[1:])
        yield Batch(
            pages=pages,
            images=patches(shifted[on_device(chosen), down, right]),
            tokens=torch.tensor(tokens).to("cuda"),
            labels=torch.tensor(labels).to("cuda"),
            loss_mask=torch.tensor(mask).to("cuda"),
        )


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def patches(images: torch.Tensor) -> torch.Tensor:
    """Cut images [b, 8, 8] into patches [b, patch, number]."""
    rows = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return rows.reshape(len(images), PATCHES, PATCH_DIM)


def words(answers: Sequence[int], images_per_sample: int) -> list[str]:
    """For each image of a sample the word that was written for it."""
    if images_per_sample == 1:
        return ["".join(LETTERS[token] for token in answers[: [*answers, END].index(END)])]
    return [NAMES[token] if token < len(NAMES) else "no numeral" for token in answers]


def drawn(image: torch.Tensor) -> str:
    """An image as text, two characters a pixel."""
    shades = " ░▒▓█"
    levels = (image * (len(shades) - 1)).round().long().tolist()
    return "\n".join("".join(shades[level] * 2 for level in row) for row in levels)
