"""Files of tensors that are laid out at once and filled later, and how the calls that write them come to make such."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks.snapshot import Extent, Snapshot
from .seams import WRITING_TENSORS

_SMALL = 1 << 20
"""Bytes of a file that is written at once."""

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format safetensors calls them, in the order in which a file has them: the widest first."""


@dataclass(frozen=True)
class Hole:
    """Where some bytes belong.

    Attributes:
        offset: In the file.
        extent: What belongs there.
        checksums: Where their CRC-32 belongs, as four bytes.
    """

    offset: int
    extent: Extent
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True)
class HollowFile:
    """A file that has all but the bytes of its tensors.

    Attributes:
        path: Where it is, until it is full.
        place: Where it belongs.
        holes: What it lacks.
    """

    path: Path
    place: Path
    holes: list[Hole] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """What it lacks."""
        return sum(hole.extent.size for hole in self.holes)

    def fill(self, snapshot: Snapshot) -> None:
        """Write what it lacks, and put it where it belongs.

        Raises:
            OSError: It cannot be written.
            RuntimeError: The snapshot is of no use any more.
        """
        with self.path.open("r+b", buffering=0) as file:
            for hole in self.holes:
                file.seek(hole.offset)
                checksum = 0
                for piece in snapshot.read(hole.extent):
                    _write(file, piece)
                    checksum = zlib.crc32(piece, checksum) if hole.checksums else 0
                for offset in hole.checksums:
                    file.seek(offset)
                    _write(file, memoryview(struct.pack("<I", checksum)))
        self.path.rename(self.place)


class Deferral:
    """Lets `torch.save` and safetensors' `save_file`, called by whomever, leave files hollow.

    What of it is not known for certain to be the same later goes to the library at once: calls from other threads, with
    other arguments, to places outside of `folder`, and what safetensors would refuse.

    Args:
        folder: Where files belong that may be filled later.
        parts: An own folder on the same file system, where they are until then.
        snapshot: Of what they are filled from.

    Attributes:
        files: What has been left hollow.
    """

    def __init__(self, folder: Path, parts: Path, snapshot: Snapshot) -> None:
        self._folder, self._parts, self._snapshot = os.path.abspath(folder), parts, snapshot
        self._thread = threading.get_ident()
        self.files: list[HollowFile] = []

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Around what writes a checkpoint."""
        makers: dict[str, Callable[..., HollowFile | None]] = {
            "save": self._torch_save,
            "save_file": self._save_file,
            "safe_save_file": self._save_file,
        }
        replaced = []
        try:
            for owner, name in WRITING_TENSORS:
                module = sys.modules.get(owner)
                stock = vars(module).get(name) if module is not None else None
                if stock is not None:
                    replaced.append((module, name, stock))
                    setattr(module, name, self._instead_of(stock, makers[name]))
            yield
        except FileNotFoundError as error:
            if any(str(file.place) in str(error) for file in self.files):
                error.add_note(
                    "With `checkpoints='background'` a file of tensors is there when the checkpoint is complete, and "
                    "not for what is called while it is saved. Set `checkpoints='wait'`."
                )
            raise
        finally:
            for module, name, stock in reversed(replaced):
                setattr(module, name, stock)

    def _instead_of(self, stock: Callable[..., Any], lay_out: Callable[..., HollowFile | None]) -> Callable[..., Any]:
        signature = inspect.signature(stock)

        def write(*args: Any, **kwargs: Any) -> Any:
            content, place, *options = signature.bind(*args, **kwargs).arguments.values()
            file = None
            if threading.get_ident() == self._thread and isinstance(place, str | os.PathLike):
                relative = os.path.relpath(os.fspath(place), self._folder)
                if not relative.startswith(os.pardir):
                    file = HollowFile(self._parts / relative, Path(place))
                    self.files = [other for other in self.files if other.path != file.path]  # it is written again
                    for folder in (file.path.parent, file.place.parent):
                        folder.mkdir(parents=True, exist_ok=True)
                    file = lay_out(stock, content, file, *options)
            if file is None:
                return stock(*args, **kwargs)
            self.files.append(file)
            return None

        return write

    # ---- torch.save ----

    def _torch_save(
        self, stock: Callable[..., Any], content: Any, file: HollowFile, *options: Any
    ) -> HollowFile | None:
        """By torch's own way to leave out the bytes of storages: `torch.serialization.skip_data`."""
        if options:
            return None
        with _noting_storages() as storages, torch.serialization.skip_data():
            stock(content, file.path)
        if sum(storage.nbytes() for storage in storages.values()) < _SMALL:
            file.path.unlink()
            return None
        with zipfile.ZipFile(file.path) as opened, file.path.open("rb") as bytes_of:
            archive = _Archive(opened, bytes_of)
            for number, storage in enumerate(storages.values()):
                if storage.nbytes():
                    offset, checksums = archive.record(number)
                    extent = self._snapshot.extent(storage, 0, storage.nbytes())
                    file.holes.append(Hole(offset, extent, checksums))
        return file

    # ---- safetensors ----

    def _save_file(
        self, stock: Callable[..., Any], tensors: Any, file: HollowFile, metadata: dict[str, str] | None = None
    ) -> HollowFile | None:
        """As the format is specified (huggingface/safetensors, `README.md`): a header in JSON, then the tensors.

        The library itself would have all of it in memory at once, and hold the interpreter's lock meanwhile.
        """
        if not _can_lay_out(tensors) or sum(tensor.nbytes for tensor in tensors.values()) < _SMALL:
            return None
        order = list(_DTYPES)
        header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
        end, begins = 0, {}
        for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
            tensor = tensors[name]
            begins[name], end = end, end + tensor.nbytes
            place = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begins[name], end]}
            header[name] = place
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with file.path.open("wb") as written:
            written.write(struct.pack("<Q", len(text)) + text)
            written.truncate(8 + len(text) + end)
        for name, begin in begins.items():
            tensor = tensors[name]
            if tensor.nbytes:
                offset = tensor.storage_offset() * tensor.element_size()
                extent = self._snapshot.extent(tensor.untyped_storage(), offset, tensor.nbytes)
                file.holes.append(Hole(8 + len(text) + begin, extent))
        return file


def _can_lay_out(tensors: Any) -> bool:
    """Whether safetensors would take them, and this module knows how."""
    if not isinstance(tensors, dict) or not all(
        type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors.values()
    ):
        return False
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.nbytes]
    return len(set(places)) == len(places) and all(
        isinstance(name, str)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.dtype in _DTYPES
        and tensor.device.type in ("cpu", "cuda")
        for name, tensor in tensors.items()
    )


# ---- What torch.save has made ----

_noting = threading.local()


def _note(storage: Any) -> None:
    """Be asked where a storage is that is pickled, leave the answer to others, and note it if this thread wants to."""
    if (noted := getattr(_noting, "storages", None)) is not None:
        noted.setdefault(storage._cdata, storage)


torch.serialization.register_package(0, _note, lambda storage, location: None)


@contextlib.contextmanager
def _noting_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """What this thread's `torch.save` writes within, in the order of its records; keys are its own."""
    noted: dict[int, torch.UntypedStorage] = {}
    _noting.storages = noted
    try:
        yield noted
    finally:
        del _noting.storages


class _Archive:
    """Where the bytes and the checksums of the records are (APPNOTE.TXT of PKWARE, sections 4.3.7, 4.3.9, 4.3.12)."""

    def __init__(self, archive: zipfile.ZipFile, file: Any) -> None:
        self._infos, self._file = archive.infolist(), file
        self._stem = self._infos[0].filename.partition("/")[0]
        self._numbers = {info.filename: number for number, info in enumerate(self._infos)}
        self._listed: list[int] = []  # where the checksum of each is in the list at the end
        offset = archive.start_dir
        for _ in self._infos:
            self._listed.append(offset + 16)
            offset += 46 + sum(self._read("<HHH", offset + 28))

    def record(self, number: int) -> tuple[int, tuple[int, ...]]:
        """Where the bytes of a storage begin, and where their checksum belongs."""
        place = self._numbers[f"{self._stem}/data/{number}"]
        info = self._infos[place]
        begin = info.header_offset + 30 + sum(self._read("<HH", info.header_offset + 26))
        follows = info.flag_bits & 8  # the checksum comes after the bytes, and after a signature
        return begin, (begin + info.file_size + 4 if follows else info.header_offset + 14, self._listed[place])

    def _read(self, form: str, offset: int) -> tuple[int, ...]:
        self._file.seek(offset)
        return struct.unpack(form, self._file.read(struct.calcsize(form)))


def _write(file: Any, piece: memoryview) -> None:
    """All of it, as one call need not."""
    while len(piece):
        piece = piece[file.write(piece) :]
