"""Evaluation between two steps of a training, which goes on as if nothing had been."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, nothing has a gradient and every part of a model evaluates.

    Afterwards each part is in the mode that it was in: a frozen encoder may evaluate all the time.

    Example:
        >>> frozen = torch.nn.Dropout(0.5).eval()
        >>> layers = torch.nn.Sequential(torch.nn.Dropout(0.5), frozen)
        >>> with evaluation_mode(layers):
        ...     [part.training for part in layers], torch.is_grad_enabled()
        ([False, False], False)
        >>> [part.training for part in layers], torch.is_grad_enabled()
        ([True, False], True)
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
