"""The two container formats of a checkpoint, .ckpt (MindSpore) and .safetensors.

Files are opened without loading their values, and written piece by piece. ckpt_records.py reads and
writes the parts of a .ckpt. A .safetensors is the size of a JSON header, the header, and the
tensors.
"""
from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from mindrlhf.checkpoints import fingerprints
from mindrlhf.checkpoints.ckpt_records import (
    CLOSING,
    MOST_DIMS,
    RECORD,
    RecordWriter,
    parse_records,
)
from mindrlhf.checkpoints.tensors import (
    DTYPES,
    WORKERS,
    StoredTensor,
    TensorItem,
    TensorSpec,
    Values,
    pieces,
)
from mindrlhf.cli import UserError, existing_file
from mindrlhf.files import atomic_file

SUFFIXES = (".ckpt", ".safetensors")


# reading

def open_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Find the tensors of a checkpoint file; their values are read later, on request.

    Returns:
        name -> tensor, in the order of the file.

    Raises:
        UserError: the file is missing, of another format, truncated or damaged.
    """
    place = existing_file(path, "a checkpoint")
    if place.suffix not in SUFFIXES:
        raise UserError(f"{place}: not a .ckpt or .safetensors file; convert_weight.py writes both")
    read = _read_safetensors if place.suffix == ".safetensors" else _read_ckpt
    try:
        file = open(place, "rb")  # noqa: SIM115  stays open as long as its tensors are in use
        tensors = read(place, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not tensors:
        raise UserError(f"{path}: contains no tensors")
    return tensors


def _read_safetensors(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    try:
        # safe_open checks the header: offsets, sizes, overlaps, gaps, length of the file
        with safe_open(path, "np"):
            pass
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: incomplete or damaged safetensors file ({error}); "
                        "download or copy it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}; "
                            f"supported: {', '.join(DTYPES)}")
        if len(entry["shape"]) > MOST_DIMS:
            raise UserError(f"{path}: {name} has more than {MOST_DIMS} dimensions")
        begin, end = entry["data_offsets"]
        span = (8 + size + begin, end - begin)
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, (span,))
    return tensors


def _read_ckpt(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    found: dict[str, tuple[TensorSpec, list[tuple[int, int]]]] = {}
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for record in parse_records(content):
                spec, spans = found.setdefault(record.spec.name, (record.spec, []))
                if spec != record.spec:
                    raise ValueError(f"{spec.name} appears twice")
                if record.span[1] or not spans:
                    spans.append(record.span)
        tensors = {name: StoredTensor(*spec, file, tuple(spans))
                   for name, (spec, spans) in found.items()}
        for tensor in tensors.values():
            if tensor.nbytes != tensor.spec.nbytes:
                raise ValueError(f"{tensor.name} is truncated")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: incomplete or damaged MindSpore checkpoint ({error}); "
                        "copy it again") from None
    return tensors


def require_intact(path: str | Path, *, needs_checksum: bool = False) -> None:
    """Raise UserError unless a checkpoint file is intact: structure and, if present, checksum.

    With needs_checksum, a .ckpt without one is damaged: training states always have it.
    """
    open_tensors(path)
    if Path(path).suffix != ".ckpt":
        return
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(CLOSING) - 10, 0))
        tail = file.read()
        if tail[:-10] != CLOSING:
            if needs_checksum:
                raise UserError(f"{path}: its end, the checksum, is missing; the file was damaged "
                                "after it was written; copy it again")
            return
        found, left = 0, size - len(tail)
        file.seek(0)
        while left:
            block = file.read(min(left, RECORD))
            found, left = zlib.crc32(block, found), left - len(block)
    if found != int.from_bytes(tail[-10:], "big"):
        raise UserError(f"{path}: checksum mismatch, the file was damaged after it was written; "
                        "copy it again")


# writing

def require_suffix(path: str | Path) -> None:
    """Raise UserError unless a path can be that of a checkpoint file."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give the name of a .ckpt or .safetensors file")
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"{path}: the name of a checkpoint must end in .ckpt or .safetensors")


def write_tensors(path: str | Path, tensors: Sequence[TensorItem],
                  progress: Callable[[int], object] | None = None, *,
                  framework: str = "np", hashed: bool = True) -> str:
    """Write a checkpoint, piece by piece.

    Args:
        path: a name that ends in .ckpt or .safetensors.
        tensors: in the order of the file; a tensor is made when it is written.
        progress: called after each piece with its size in bytes.
        framework: named in the metadata of a .safetensors; transformers requires "pt".
        hashed: whether to compute the fingerprint.

    Returns:
        the fingerprint of what was written, 64 hex digits; empty without hashed.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is unchanged.
    """
    path = Path(path)
    require_suffix(path)
    specs = [item.spec for item in tensors]
    with atomic_file(path) as file, TensorWriter(file, path.suffix, specs, framework=framework,
                                                 hashed=hashed) as writer:
        for item in tensors:
            writer.add(item.make(), progress)
    return writer.identity.hexdigest() if hashed else ""


class _Sink(Protocol):
    """What bytes can be written to."""

    def write(self, data: memoryview) -> object:
        """Write all bytes."""


class TensorWriter:
    """A context manager that writes the tensors of a checkpoint into an open file, in order.

    Args:
        file: an empty binary file.
        suffix: ".ckpt" or ".safetensors".
        tensors: the tensors to come, in the order of the calls of add().
        framework: as in write_tensors().
        hashed: as in write_tensors().
    """

    def __init__(self, file: BinaryIO, suffix: str, tensors: Sequence[TensorSpec], *,
                 framework: str = "np", hashed: bool = True) -> None:
        self.file, self.suffix, self.hashed = file, suffix, hashed
        self.left, self.identity = list(reversed(tensors)), fingerprints.Fingerprint()
        if suffix == ".safetensors":
            file.write(_safetensors_header(tensors, framework))

    def __enter__(self) -> TensorWriter:
        self.pool = ThreadPoolExecutor(WORKERS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.pool.shutdown()
        if kind is None and self.left:
            raise ValueError(f"{len(self.left)} tensors were not added")

    def add(self, made: Values, progress: Callable[[int], object] | None = None) -> None:
        """Write the next tensor.

        Args:
            made: the stored array, or an iterable of its pieces.
            progress: called after each piece with its size in bytes.
        """
        spec = self.left.pop()
        sink: _Sink = self.file if self.suffix == ".safetensors" else RecordWriter(self.file, spec)
        digests: list[Future[bytes]] = []
        for data in _data(made, spec):
            if self.hashed:
                digests.append(self.pool.submit(fingerprints.digest, data))  # while it is written
                digests[max(len(digests) - 2 * WORKERS, 0)].result()  # limits the pieces in memory
            sink.write(data)
            if progress:
                progress(len(data))
        self.identity.add(spec, [future.result() for future in digests])


def _data(made: Values, spec: TensorSpec) -> Iterator[memoryview]:
    """The bytes of each piece of an array, or of pieces that are made one after another."""
    elements = math.prod(spec.shape)
    if isinstance(made, (np.ndarray, np.generic)):
        flat = made.reshape(-1)
        made = (flat[first:first + count] for first, count in pieces(elements))
    sizes = [count for _, count in reversed(pieces(elements))]
    for piece in made:
        if not sizes or piece.size != sizes.pop():
            raise ValueError(f"{spec.name}: a piece of {piece.size} elements; tensors.pieces cuts "
                             f"{elements} elements otherwise")
        yield np.ascontiguousarray(piece, DTYPES[spec.dtype][1]).view(np.uint8).data
    if sizes:
        raise ValueError(f"{spec.name}: {len(sizes)} pieces of {elements} elements are missing")


def _safetensors_header(tensors: Sequence[TensorSpec], framework: str) -> bytes:
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": framework}}
    offset = 0
    for spec in tensors:
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape),
                             "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
