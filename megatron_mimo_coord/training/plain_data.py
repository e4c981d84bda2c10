"""Nested Python data as JSON, and back as it was, with tensors and bytes beside it.

Nothing is pickled. In the JSON a tensor, or bytes, are the digest of what is beside it, so that two
values are the same if their JSON is.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

_BYTES, _TENSOR, _TUPLE, _COUNTER = "$bytes", "$tensor", "$tuple", "$counter"
_MAX_DEPTH = 100

Blobs = dict[str, bytes | memoryview]
"""Bytes, and elements of tensors, by their SHA-256."""


def encode(value: Any, where: str, blobs: Blobs, depth: int = 0) -> Any:
    """What JSON can say of a value.

    Args:
        value: mappings with string keys, which come back as dicts, lists, tuples, strings, bytes,
            numbers, booleans, None, tensors, and a ``Counter`` of integers, which learning-rate
            schedulers keep.
        where: the value's name, for the error.
        blobs: is filled with what JSON does not say. Tensors in host memory are not copied.
        depth: how many values it is inside of.

    Raises:
        ValueError: something else is inside; names where.

    Example:
        >>> blobs = {}
        >>> encode({"betas": (0.9, 0.95), "raw": b"abc"}, "extra", blobs)["betas"]
        {'$tuple': [0.9, 0.95]}
        >>> list(blobs.values())
        [b'abc']
        >>> encode({"sampler": {3: "odd"}}, "extra", blobs)
        Traceback (most recent call last):
        ValueError: extra['sampler'] has the key 3: use strings that do not begin with $
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where[:80]}... is more than {_MAX_DEPTH} levels deep, or inside itself")
    if type(value) is bytes:
        return {_BYTES: put(value, blobs)}
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{i}]", blobs, depth + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {_TUPLE: items}
    if isinstance(value, Counter) and all(type(key) is int for key in value):
        return {_COUNTER: encode(list(value.items()), where, blobs, depth + 1)}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str or key.startswith("$"):
                raise ValueError(
                    f"{where} has the key {key!r}: use strings that do not begin with $"
                )
        return {k: encode(item, f"{where}[{k!r}]", blobs, depth + 1) for k, item in value.items()}
    if isinstance(value, torch.Tensor) and _is_plain(value):
        dtype = str(value.dtype).removeprefix("torch.")
        elements = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        return {_TENSOR: [dtype, list(value.shape), put(elements.data, blobs)]}
    raise ValueError(
        f"{where} is a {type(value).__name__}: a checkpoint takes dicts, lists, tuples, strings, "
        f"bytes, numbers, booleans, None and dense real tensors, because nothing in it is pickled"
    )


def put(data: bytes | memoryview, blobs: Blobs) -> str:
    """Add bytes; returns their digest."""
    digest = hashlib.sha256(data).hexdigest()
    blobs[digest] = data
    return digest


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements are numbers in memory, and all there is of it."""
    is_dense = tensor.layout is torch.strided and not tensor.is_meta
    return is_dense and not tensor.is_quantized and not tensor.dtype.is_complex


def decode(value: Any, read: Callable[[str], torch.Tensor]) -> Any:
    """The value that :func:`encode` was given.

    Args:
        value: what JSON says of it.
        read: finds bytes by their digest.

    Example:
        >>> decode({"betas": {"$tuple": [0.9, 0.95]}}, read={}.__getitem__)
        {'betas': (0.9, 0.95)}
    """
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return read(value[_BYTES]).numpy().tobytes()
    if _TUPLE in value:
        return tuple(decode(item, read) for item in value[_TUPLE])
    if _COUNTER in value:
        return Counter({key: decode(item, read) for key, item in decode(value[_COUNTER], read)})
    if _TENSOR in value:
        dtype, shape, digest = value[_TENSOR]
        return read(digest).clone().view(getattr(torch, dtype)).view(shape)
    return {key: decode(item, read) for key, item in value.items()}
