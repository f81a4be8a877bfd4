"""The records of a .ckpt, MindSpore's checkpoint: how they are read and written.

A .ckpt is a protobuf message of repeated records {tag, tensor {dims, type, content}}; a large
tensor takes several records with the same tag.
"""
from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mindrlhf.checkpoints.tensors import DTYPES, TensorSpec

FROM_CKPT = {name: dtype for dtype, (name, _) in DTYPES.items()}
RECORD = 64 << 20  # bytes of a tensor in one record
MOST_DIMS = 32  # of a tensor: NumPy's limit
CLOSING = b"crc_num"  # MindSpore may end a .ckpt with this word and ten bytes


class _Extent(NamedTuple):
    """The bytes of a length-delimited protobuf field: from start to stop."""
    start: int
    stop: int


class Record(NamedTuple):
    """A record of a .ckpt.

    Attributes:
        spec: of the tensor.
        span: (offset, size) in bytes of the part of the tensor that the record contains.
    """
    spec: TensorSpec
    span: tuple[int, int]


def parse_records(content: mmap.mmap) -> Iterator[Record]:
    """The records of a .ckpt that contain tensors.

    Raises:
        ValueError, KeyError, IndexError, TypeError: the file is truncated or damaged.
    """
    end = len(content)
    if content[-len(CLOSING) - 10:-10] == CLOSING:
        end -= len(CLOSING) + 10
    for number, value in _fields(content, 0, end):
        extent = _extent(value)
        if number != 1:
            raise ValueError(f"unknown record before byte {extent.stop}")
        record = _parse_record(content, extent)
        if record:
            yield record


def _parse_record(content: mmap.mmap, extent: _Extent) -> Record | None:
    """Parse a record; None if it is a string that the training script added."""
    parts = dict(_fields(content, *extent))
    name = content[slice(*_extent(parts[1]))].decode()
    dims, kind, span = [], "", (extent.start, 0)
    for number, value in _fields(content, *_extent(parts[2])):
        if number == 1:
            dims.append(_integer(value))
            if len(dims) > MOST_DIMS:
                raise ValueError(f"{name} has more than {MOST_DIMS} dimensions")
        elif number == 2:
            kind = content[slice(*_extent(value))].decode()
        elif number == 3:
            start, stop = _extent(value)
            span = (start, stop - start)
    if kind == "str":
        return None
    return Record(TensorSpec(name, FROM_CKPT[kind], () if dims == [0] else tuple(dims)), span)


def _extent(value: int | _Extent) -> _Extent:
    if isinstance(value, int):
        raise ValueError("an integer where bytes are expected")
    return value


def _integer(value: int | _Extent) -> int:
    if not isinstance(value, int):
        raise ValueError(f"bytes where an integer is expected, before byte {value.stop}")
    return value


def _fields(content: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int | _Extent]]:
    """The fields of a protobuf message: (field number, value)."""
    while position < end:
        key, position = _varint(content, position)
        integer, position = _varint(content, position)
        value: int | _Extent = integer
        if key & 7 == 2:
            value = _Extent(position, position + integer)
            position += integer
        elif key & 7:
            raise ValueError(f"unknown wire type before byte {position}")
        if position > end:
            raise ValueError("unexpected end of a record")
        yield key >> 3, value


def _varint(content: mmap.mmap, position: int) -> tuple[int, int]:
    """An integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


class RecordWriter:
    """Writes one tensor as records of a .ckpt."""

    def __init__(self, file: BinaryIO, spec: TensorSpec) -> None:
        self.file, self.left, self.room = file, spec.nbytes, 0
        self.tag = _text(1, spec.name)
        dims = b"".join(b"\x08" + encode(size) for size in spec.shape)
        self.start = dims + _text(2, DTYPES[spec.dtype][0])
        if not self.left:
            self._begin()

    def _begin(self) -> None:
        """Write what comes before the bytes of a record."""
        self.room = min(self.left, RECORD)
        head = self.start + b"\x1a" + encode(self.room)
        tensor = b"\x12" + encode(len(head) + self.room) + head
        size = len(self.tag) + len(tensor) + self.room
        self.file.write(b"\x0a" + encode(size) + self.tag + tensor)

    def write(self, data: memoryview) -> None:
        """Add bytes, of any length."""
        while data:
            if not self.room:
                self._begin()
            part = data[:self.room]
            self.file.write(part)
            self.left, self.room = self.left - len(part), self.room - len(part)
            data = data[len(part):]


def encode(value: int) -> bytes:
    """An integer as a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(number: int, text: str) -> bytes:
    """A string as a protobuf field."""
    content = text.encode()
    return bytes([number << 3 | 2]) + encode(len(content)) + content
