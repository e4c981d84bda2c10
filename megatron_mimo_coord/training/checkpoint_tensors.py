"""Tensors in the files of a checkpoint: each rank writes what it holds, and reads what it needs.

The files are those of PyTorch's distributed checkpoints (the ``torch_dist`` backend of Megatron's),
so that Megatron's own ``dist_checkpointing.load`` reads them too. Here no rank waits for another:
a rank writes into a file of its own and lists its tensors in JSON, and whoever reads maps the files
into memory and copies the elements that it wants. Nothing is unpickled.
"""

import hashlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mimo_coord.layout.boxes import Box
from megatron_mimo_coord.megatron.checkpoints import Chunk

_ALIGNMENT = 64  # of the elements in a file, so that they can be used where they are mapped
_LOCAL_HEADER = 30  # bytes of a zip entry's header before the lengths of its name and extra field

Entry = dict[str, Any]
"""Where a chunk is: key, dtype, shape of the whole tensor, box, file and place in it. JSON."""


# -- writing ---------------------------------------------------------------------------------------


class ChunkFile:
    """One rank's file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write_tensor(self, chunk: Chunk) -> Entry:
        """Append a chunk; returns where it is."""
        # A copy: of a view, everything that it is a view of would be saved.
        data = chunk.data.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        buffer = io.BytesIO()
        torch.save(data.view(chunk.box.size), buffer)
        at = self._append(buffer.getbuffer())
        return {
            "key": chunk.key,
            "dtype": chunk.dtype,
            "shape": chunk.shape,
            "padded_for": chunk.padded_for,
            "offset": chunk.box.offset,
            "size": chunk.box.size,
            "file": self._name,
            "at": at,
            "length": self._size - at,
            "elements_at": at + _elements_at(buffer),
        }

    def write_object(self, key: str, value: Any) -> Entry:
        """Append what Megatron keeps as an object, not a tensor; returns where it is."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        at = self._append(buffer.getbuffer())
        return {"key": key, "file": self._name, "at": at, "length": self._size - at}

    def close(self) -> dict[str, Any]:
        """Have everything on disk; returns size and digest, as a manifest lists them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def _append(self, data: memoryview) -> int:
        padding = bytes(-self._size % _ALIGNMENT)
        for part in (padding, data):
            self._file.write(part)
            self._digest.update(part)
        at = self._size + len(padding)
        self._size = at + len(data)
        return at


def _elements_at(buffer: io.BytesIO) -> int:
    """Where in what ``torch.save`` wrote, a zip file, the elements of its one tensor begin."""
    with zipfile.ZipFile(buffer) as archive:
        start = next(
            (i.header_offset for i in archive.infolist() if i.filename.endswith("/data/0")), None
        )
    if start is None:  # a tensor without elements
        return 0
    lengths = struct.unpack_from("<HH", buffer.getbuffer(), start + _LOCAL_HEADER - 4)
    return int(start + _LOCAL_HEADER + sum(lengths))


# -- what all ranks wrote --------------------------------------------------------------------------


@frozen
class Index:
    """What a checkpoint holds: the chunks of each whole tensor, and objects, by their key.

    Files are mapped into memory and not read whole. Elements become those of another data type
    where the reader holds another.

    Args:
        path: the folder of the files.
        tensors: dtype, shape and chunks of each whole tensor.
        objects: where each object is.
    """

    path: Path
    tensors: dict[str, Any]
    objects: dict[str, Entry] = field(factory=dict)
    _files: dict[str, torch.Tensor] = field(factory=dict, init=False)

    @classmethod
    def merge(cls, path: Path, ranks: Iterable[Mapping[str, list[Entry]]]) -> "Index":
        """Join what the ranks have written; where two wrote the same part, the first counts.

        Raises:
            ValueError: a tensor is not there whole, or ranks wrote different things for one.
        """
        tensors: dict[str, Any] = {}
        objects: dict[str, Entry] = {}
        for entries in ranks:
            for entry in entries["objects"]:
                objects.setdefault(entry["key"], entry)
            for entry in entries["tensors"]:
                entry = dict(entry)
                key = entry.pop("key")
                kind = {name: entry.pop(name) for name in ("dtype", "shape", "padded_for")}
                tensor = tensors.setdefault(key, {**kind, "chunks": {}})
                if tensor != {**kind, "chunks": tensor["chunks"]}:
                    raise ValueError(
                        f"ranks hold {key} as {tensor['dtype']} {tensor['shape']} and as "
                        f"{kind['dtype']} {kind['shape']}"
                    )
                tensor["chunks"].setdefault((*entry["offset"], *entry["size"]), entry)
        for key, tensor in tensors.items():
            tensor["chunks"] = list(tensor["chunks"].values())
            _refuse_gaps(key, tensor)
        return cls(path, tensors, objects)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Index":
        """Whole tensors in memory."""
        found = {
            key: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tuple(tensor.shape),
                "chunks": [
                    {"offset": [0] * tensor.ndim, "size": tuple(tensor.shape), "data": tensor}
                ],
            }
            for key, tensor in tensors.items()
        }
        return cls(Path(), found)

    @classmethod
    def of_megatron(cls, path: Path, name_of: Callable[[str], str]) -> "Index":
        """What Megatron's ``dist_checkpointing`` wrote, of which PyTorch unpickles the index.

        Args:
            path: the folder with ``.metadata``.
            name_of: the key here of one there; an empty one for what is to be left out.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        metadata = FileSystemReader(path).read_metadata()
        places = {
            (at.fqn, at.offset): {"file": i.relative_path, "at": i.offset, "length": i.length}
            for at, i in (metadata.storage_data or {}).items()
        }
        tensors = {
            name_of(key): {
                "dtype": str(found.properties.dtype).removeprefix("torch."),
                "shape": tuple(found.size),
                "chunks": [
                    {"offset": c.offsets, "size": c.sizes, **places[key, c.offsets]}
                    for c in found.chunks
                ],
            }
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and name_of(key)
        }
        return cls(path, tensors)

    def save_for_megatron(self) -> None:
        """Write the index that PyTorch reads (``.metadata``); this package does not."""
        found: dict[str, Any] = {key: BytesStorageMetadata() for key in self.objects}
        places = {MetadataIndex(key): _place(entry) for key, entry in self.objects.items()}
        for key, tensor in self.tensors.items():
            chunks = tensor["chunks"]
            found[key] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor["dtype"])),
                torch.Size(tensor["shape"]),
                [
                    ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["size"]))
                    for c in chunks
                ],
            )
            places |= {MetadataIndex(key, torch.Size(c["offset"])): _place(c) for c in chunks}
        with (self.path / ".metadata").open("wb") as file:
            pickle.dump(Metadata(found, storage_data=places), file)

    # -- reading -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, chunk: Chunk) -> None:
        """Copy into a chunk what the checkpoint has of it."""
        target = chunk.data.detach().view(chunk.box.size)
        if chunk.padded_for:
            target.zero_()
        for entry in self.tensors[chunk.key]["chunks"]:
            box = _box(entry)
            both = box.overlap(chunk.box) if box.volume else None
            if both is not None:
                source = self._elements(chunk.key, entry)[box.slices_of(both)]
                target[chunk.box.slices_of(both)].copy_(source)

    def object(self, key: str) -> Any:
        """What :meth:`ChunkFile.write_object` wrote; PyTorch refuses all but plain data."""
        entry = self.objects[key]
        data = self._file(entry["file"])[entry["at"] : entry["at"] + entry["length"]]
        (value,) = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
        return value

    def _elements(self, key: str, entry: Entry) -> torch.Tensor:
        if "data" in entry:
            return entry["data"]
        if "elements_at" not in entry:  # who wrote it did not say
            at = slice(entry["at"], entry["at"] + entry["length"])
            buffer = io.BytesIO(self._file(entry["file"])[at].numpy().tobytes())
            return torch.load(buffer, weights_only=True, map_location="cpu")
        dtype = getattr(torch, self.tensors[key]["dtype"])
        start = entry["elements_at"]
        data = self._file(entry["file"])[start : start + _box(entry).volume * dtype.itemsize]
        return data.view(dtype).view(entry["size"])

    def _file(self, name: str) -> torch.Tensor:
        if name not in self._files:
            path = self.path / name
            self._files[name] = torch.from_file(
                str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8, device="cpu"
            )
        return self._files[name]


def _place(entry: Entry) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # checked by a coordinator

    return _StorageInfo(entry["file"], entry["at"], entry["length"])


def _refuse_gaps(key: str, tensor: Mapping[str, Any]) -> None:
    """Chunks that do not overlap cover a tensor if they have as many elements."""
    whole = Box([0] * len(tensor["shape"]), tensor["shape"])
    boxes = sorted(_box(chunk).offset + _box(chunk).size for chunk in tensor["chunks"])
    written = sum(_box(chunk).volume for chunk in tensor["chunks"])
    if written != whole.volume:
        raise ValueError(
            f"{written} elements of {key} were written, but it has {whole.volume}: its "
            f"sharded_state_dict gives parts of it to no rank, or to several; the parts (offset, "
            f"size) are {boxes[:8]}"
        )


def _box(entry: Mapping[str, Any]) -> Box:
    return Box(entry["offset"], entry["size"])
