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
"""Where something is: file, place in it and length; of a chunk also its box in the tensor. JSON."""


# -- writing ---------------------------------------------------------------------------------------


class ChunkFile:
    """One rank's file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> Entry:
        """Append bytes; returns where they are."""
        padding = bytes(-self._size % _ALIGNMENT)
        for part in (padding, data):
            self._file.write(part)
            self._digest.update(part)
        at = self._size + len(padding)
        self._size = at + len(data)
        return {"file": self._name, "at": at, "length": len(data)}

    def write_tensor(self, chunk: Chunk) -> Entry:
        """Append a chunk; returns where it is, and what the whole tensor is."""
        # A copy: of a view, everything that it is a view of would be saved.
        data = chunk.data.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        buffer = io.BytesIO()
        torch.save(data.view(chunk.box.size), buffer)
        entry = self.write(buffer.getbuffer())
        return entry | {
            "key": chunk.key,
            "dtype": chunk.dtype,
            "shape": chunk.shape,
            "padded_for": chunk.padded_for,
            "offset": chunk.box.offset,
            "size": chunk.box.size,
            "elements_at": entry["at"] + _elements_at(buffer),
        }

    def write_object(self, key: str, value: Any) -> Entry:
        """Append what Megatron keeps as an object, not a tensor; returns where it is."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        return self.write(buffer.getbuffer()) | {"key": key}

    def close(self) -> dict[str, Any]:
        """Have everything on disk; returns size and digest, as a manifest lists them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


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
    """What a checkpoint holds: the chunks of each whole tensor, objects and bytes.

    Files are mapped into memory and not read whole. Elements become those of another data type
    where the reader holds another.

    Args:
        path: the folder of the files.
        tensors: dtype, shape and chunks of each whole tensor, by its key.
        objects: where each object is, by its key.
        blobs: where bytes are, by their digest.
    """

    path: Path
    tensors: dict[str, Any]
    objects: dict[str, Entry] = field(factory=dict)
    blobs: dict[str, Entry] = field(factory=dict)
    _files: dict[str, torch.Tensor] = field(factory=dict, init=False)

    @classmethod
    def merge(cls, path: Path, ranks: Iterable[Mapping[str, Any]]) -> "Index":
        """Join what the ranks have written; where two wrote the same part, the first counts.

        Raises:
            ValueError: a tensor is not there whole, or ranks wrote different things for one.
        """
        index = cls(path, {})
        for entries in ranks:
            for entry in entries["objects"]:
                index.objects.setdefault(entry["key"], entry)
            for digest, entry in entries["blobs"].items():
                index.blobs.setdefault(digest, entry)
            for entry in entries["tensors"]:
                key, kind = entry["key"], {n: entry[n] for n in ("dtype", "shape", "padded_for")}
                tensor = index.tensors.setdefault(key, {**kind, "chunks": {}})
                if tensor != {**kind, "chunks": tensor["chunks"]}:
                    raise ValueError(
                        f"ranks hold {key} as {tensor['dtype']} {tensor['shape']} and as "
                        f"{kind['dtype']} {kind['shape']}"
                    )
                chunk = {n: each for n, each in entry.items() if n not in (*kind, "key")}
                tensor["chunks"].setdefault((*entry["offset"], *entry["size"]), chunk)
        for key, tensor in index.tensors.items():
            tensor["chunks"] = list(tensor["chunks"].values())
            _refuse_gaps(key, tensor)
        return index

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Index":
        """Whole tensors in memory."""
        found = {}
        for key, each in tensors.items():
            chunk = {"offset": [0] * each.ndim, "size": tuple(each.shape), "data": each}
            found[key] = _described(each.dtype, each.shape, [chunk])
        return cls(Path(), found)

    @classmethod
    def of_megatron(cls, path: Path, name_of: Callable[[str], str]) -> "Index":
        """What Megatron's ``dist_checkpointing`` wrote, of which PyTorch unpickles the index.

        Args:
            path: the folder with ``.metadata``.
            name_of: the key here of one there; an empty one for what is to be left out.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        metadata, found = FileSystemReader(path).read_metadata(), {}
        places = {
            (at.fqn, at.offset): {"file": i.relative_path, "at": i.offset, "length": i.length}
            for at, i in (metadata.storage_data or {}).items()
        }
        for key, each in metadata.state_dict_metadata.items():
            if isinstance(each, TensorStorageMetadata) and name_of(key):
                chunks = [
                    {"offset": c.offsets, "size": c.sizes, **places[key, c.offsets]}
                    for c in each.chunks
                ]
                found[name_of(key)] = _described(each.properties.dtype, each.size, chunks)
        return cls(path, found)

    def save_for_megatron(self) -> None:
        """Write the index that PyTorch reads (``.metadata``); this package does not."""
        found: dict[str, Any] = {key: BytesStorageMetadata() for key in self.objects}
        places = {MetadataIndex(key): _place(entry) for key, entry in self.objects.items()}
        for key, tensor in self.tensors.items():
            boxes = [
                ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["size"]))
                for c in tensor["chunks"]
            ]
            found[key] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor["dtype"])),
                torch.Size(tensor["shape"]),
                boxes,
            )
            for box, chunk in zip(boxes, tensor["chunks"], strict=True):
                places[MetadataIndex(key, box.offsets)] = _place(chunk)
        with (self.path / ".metadata").open("wb") as file:
            pickle.dump(Metadata(found, storage_data=places), file)

    # -- reading -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, chunk: Chunk, key: str) -> None:
        """Copy into a chunk what the checkpoint has of it, under a key."""
        target = chunk.data.detach().view(chunk.box.size)
        if chunk.padded_for:
            target.zero_()
        for entry in self.tensors[key]["chunks"]:
            box = _box(entry)
            both = box.overlap(chunk.box) if box.volume else None
            if both is not None:
                source = self._elements(key, entry)[box.slices_of(both)]
                target[chunk.box.slices_of(both)].copy_(source)

    def object(self, key: str) -> Any:
        """What :meth:`ChunkFile.write_object` wrote; PyTorch refuses all but plain data."""
        (value,) = self._unpacked(self.objects[key])
        return value

    def blob(self, digest: str) -> torch.Tensor:
        """Bytes, by their digest."""
        return self._mapped(self.blobs[digest])

    def _elements(self, key: str, entry: Entry) -> torch.Tensor:
        if "data" in entry:
            return entry["data"]
        if "elements_at" not in entry:  # who wrote it did not say
            return self._unpacked(entry)
        dtype = getattr(torch, self.tensors[key]["dtype"])
        length = _box(entry).volume * dtype.itemsize
        elements = self._mapped({**entry, "at": entry["elements_at"], "length": length})
        return elements.view(dtype).view(entry["size"])

    def _unpacked(self, entry: Entry) -> Any:
        """What ``torch.save`` wrote, if it is plain data."""
        data = io.BytesIO(self._mapped(entry).numpy().tobytes())
        return torch.load(data, weights_only=True, map_location="cpu")

    def _mapped(self, entry: Entry) -> torch.Tensor:
        name, start = entry["file"], entry["at"]
        if name not in self._files:
            path = self.path / name
            self._files[name] = torch.from_file(
                str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8, device="cpu"
            )
        return self._files[name][start : start + entry["length"]]


def _described(dtype: torch.dtype, shape: Iterable[int], chunks: list[Entry]) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "shape": tuple(shape), "chunks": chunks}


def _place(entry: Entry) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # checked by a coordinator

    return _StorageInfo(entry["file"], entry["at"], entry["length"])


def _refuse_gaps(key: str, tensor: Mapping[str, Any]) -> None:
    """Chunks that do not overlap cover a tensor if they have as many elements."""
    boxes = [_box(chunk) for chunk in tensor["chunks"]]
    written, whole = sum(box.volume for box in boxes), Box(tensor["shape"], tensor["shape"]).volume
    if written != whole:
        raise ValueError(
            f"{written} elements of {key} were written, but it has {whole}: its "
            f"sharded_state_dict gives parts of it to no rank, or to several; the parts (offset, "
            f"size) are {sorted(box.offset + box.size for box in boxes)[:8]}"
        )


def _box(entry: Mapping[str, Any]) -> Box:
    return Box(entry["offset"], entry["size"])
