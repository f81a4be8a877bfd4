"""The formats of a checkpoint, .ckpt (MindSpore's) and .safetensors: read without loading, written in pieces.

A .ckpt is a protobuf message of repeated records {tag, tensor {dims, type, content}}; a large tensor takes
several records of one tag. A .safetensors is the size of a JSON header, the header, and the tensors.
"""
import json
import math
import mmap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mindrlhf.checkpoints import fingerprints
from mindrlhf.checkpoints.tensors import DTYPES, WORKERS, StoredTensor, count_bytes, pieces
from mindrlhf.cli import UserError, existing_file
from mindrlhf.files import atomic_file

SUFFIXES = (".ckpt", ".safetensors")
FROM_CKPT = {name: dtype for dtype, (name, _) in DTYPES.items()}
RECORD = 64 << 20  # bytes of a tensor in one record of a .ckpt
CLOSING = b"crc_num"  # MindSpore may end a .ckpt with this word and ten bytes


# reading

def open_tensors(path):
    """Find the tensors of a checkpoint file; their values stay there until they are asked for.

    Returns:
        dict, name -> StoredTensor, in the order of the file.

    Raises:
        UserError: the file is missing, of another kind, cut short or damaged.
    """
    path = existing_file(path, "a checkpoint")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a checkpoint ends in .ckpt or .safetensors; convert_weight.py makes one")
    try:
        file = open(path, "rb")  # noqa: SIM115  open as long as its tensors are
        tensors = _read_safetensors(path, file) if path.suffix == ".safetensors" else _read_ckpt(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _read_safetensors(path, file):
    try:
        with safe_open(path, "np"):  # checks the header: offsets, sizes, overlaps, gaps, length of the file
            pass
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch or copy it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; weights are one of {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        span = (8 + size + begin, end - begin)
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, (span,))
    return tensors


def _read_ckpt(path, file):
    tensors = {}
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            if content[-len(CLOSING) - 10:-10] == CLOSING:
                end -= len(CLOSING) + 10
            for number, (start, stop) in _fields(content, 0, end):
                if number != 1:
                    raise ValueError(f"unknown record before byte {stop}")
                name, dtype, shape, span = _record(content, start, stop)
                if dtype is None:
                    continue
                before = tensors.get(name, StoredTensor(name, dtype, shape, file, ()))
                if (before.dtype, before.shape) != (dtype, shape):
                    raise ValueError(f"{name} stands twice")
                tensors[name] = StoredTensor(name, dtype, shape, file, (*before.spans, span))
        for tensor in tensors.values():
            if tensor.nbytes != count_bytes(tensor.dtype, tensor.shape):
                raise ValueError(f"{tensor.name} is cut short")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not a whole MindSpore checkpoint ({error}); copy it again") from None
    return tensors


def _record(content, start, stop):
    """One record: (name, dtype or None for a remark of the trainer, shape, span of its bytes)."""
    parts = dict(_fields(content, start, stop))
    name = content[slice(*parts[1])].decode()
    dims, kind, span = [], "", None
    for number, value in _fields(content, *parts[2]):
        if number == 1:
            dims.append(int(value))
        elif number == 2:
            kind = content[slice(*value)].decode()
        elif number == 3:
            span = (value[0], value[1] - value[0])
    if kind == "str":
        return name, None, (), None
    return name, FROM_CKPT[kind], () if dims == [0] else tuple(dims), span or (start, 0)


def _fields(content, position, end):
    """The fields of a protobuf message: (number, int, or (start, stop) of its bytes)."""
    while position < end:
        key, position = _varint(content, position)
        value, position = _varint(content, position)
        if key & 7 == 2:
            start, position = position, position + value
            value = (start, position)
        elif key & 7:
            raise ValueError(f"unknown kind of record before byte {position}")
        if position > end:
            raise ValueError("it ends too early")
        yield key >> 3, value


def _varint(content, position):
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number does not end")


def require_intact(path):
    """Raise UserError unless a checkpoint file is whole: structure and, where MindSpore left one, checksum."""
    open_tensors(path)
    if Path(path).suffix != ".ckpt":
        return
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(CLOSING) - 10, 0))
        tail = file.read()
        if tail[:-10] != CLOSING:
            return
        found, left = 0, size - len(tail)
        file.seek(0)
        while left:
            block = file.read(min(left, RECORD))
            found, left = zlib.crc32(block, found), left - len(block)
    if found != int.from_bytes(tail[-10:], "big"):
        raise UserError(f"{path}: its checksum does not fit; it was damaged after it was written")


# identity

# writing

def require_suffix(path):
    """Raise UserError where a path cannot be that of a checkpoint."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file that ends in .ckpt or .safetensors")
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"{path}: the name of a checkpoint ends in .ckpt or .safetensors")


def write_tensors(path, tensors, progress=None, *, framework="np", hashed=True):
    """Write a checkpoint, piece by piece.

    Args:
        path: a name that ends in .ckpt or .safetensors.
        tensors: list of (name, dtype, shape, make); make() returns the stored array, or an iterable of
            its pieces (flat arrays, as tensors.pieces cuts them).
        progress: called with the number of bytes after each piece.
        framework: what a .safetensors says it is for; transformers wants "pt".
        hashed: False where nobody wants the fingerprint.

    Returns:
        the fingerprint of what was written, 64 hex digits; None without hashed.

    Raises:
        UserError: the file cannot be written. Nothing is left under its name.
    """
    path = Path(path)
    require_suffix(path)
    with atomic_file(path) as file, TensorWriter(file, path.suffix, [item[:3] for item in tensors],
                                           framework=framework, hashed=hashed) as writer:
        for *_, make in tensors:
            writer.add(make(), progress)
    return writer.identity.hexdigest() if hashed else None


class TensorWriter:
    """Writes the tensors of a checkpoint into an open file, one add() after another.

    Args:
        file: binary, empty.
        suffix: ".ckpt" or ".safetensors".
        tensors: list of (name, dtype, shape), in the order in which they are added.
        framework, hashed: as in write().
    """

    def __init__(self, file, suffix, tensors, *, framework="np", hashed=True):
        self.file, self.suffix, self.hashed = file, suffix, hashed
        self.left, self.identity = list(reversed(tensors)), fingerprints.Fingerprint()
        if suffix == ".safetensors":
            file.write(_safetensors_header(tensors, framework))

    def __enter__(self):
        self.pool = ThreadPoolExecutor(WORKERS)
        return self

    def __exit__(self, kind, error, trace):
        self.pool.shutdown()
        if kind is None and self.left:
            raise ValueError(f"{len(self.left)} tensors were not added")

    def add(self, made, progress=None):
        """Write the next tensor.

        Args:
            made: the stored array, or an iterable of its pieces, as in write().
            progress: called with the number of bytes after each piece.
        """
        name, dtype, shape = self.left.pop()
        sink = self.file if self.suffix == ".safetensors" else _RecordWriter(self.file, name, dtype, shape)
        digests = []
        for data in _data(made, dtype, math.prod(shape)):
            if self.hashed:
                digests.append(self.pool.submit(fingerprints.digest, data))  # beside the writing
                digests[max(len(digests) - 2 * WORKERS, 0)].result()  # no more pieces in memory than that
            sink.write(data)
            if progress:
                progress(len(data))
        self.identity.add(name, dtype, shape, [future.result() for future in digests])


def _data(made, dtype, elements):
    """The bytes of each piece of an array, or of pieces that are made one after another."""
    if isinstance(made, (np.ndarray, np.generic)):
        flat = made.reshape(-1)
        made = (flat[first:first + count] for first, count in pieces(elements))
    sizes = [count for _, count in reversed(pieces(elements))]
    for piece in made:
        if not sizes or piece.size != sizes.pop():
            raise ValueError(f"a piece of {piece.size} elements is not as tensors.pieces cuts {elements}")
        yield memoryview(np.ascontiguousarray(piece, DTYPES[dtype][1]).view(np.uint8))
    if sizes:
        raise ValueError(f"{len(sizes)} pieces of {elements} elements were not made")


def _safetensors_header(tensors, framework):
    header, offset = {"__metadata__": {"format": framework}}, 0
    for name, dtype, shape in tensors:
        end = offset + count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _RecordWriter:
    """Writes one tensor as records of a .ckpt."""

    def __init__(self, file, name, dtype, shape):
        self.file, self.left, self.room = file, count_bytes(dtype, shape), 0
        self.tag = _text(1, name)
        self.start = b"".join(b"\x08" + _number(size) for size in shape) + _text(2, DTYPES[dtype][0])
        if not self.left:
            self._begin()

    def _begin(self):
        self.room = min(self.left, RECORD)
        head = self.start + b"\x1a" + _number(self.room)
        tensor = b"\x12" + _number(len(head) + self.room) + head
        self.file.write(b"\x0a" + _number(len(self.tag) + len(tensor) + self.room) + self.tag + tensor)

    def write(self, data):
        """Add bytes, of any length."""
        while data:
            if not self.room:
                self._begin()
            part = data[:self.room]
            self.file.write(part)
            self.left, self.room, data = self.left - len(part), self.room - len(part), data[len(part):]


def _number(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(number, text):
    content = text.encode()
    return bytes([number << 3 | 2]) + _number(len(content)) + content
