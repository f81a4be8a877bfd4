"""Tensors in files: dtypes, records, reading piece by piece, and conversion between precisions."""
from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, TypeVar, Union

import numpy as np

from mindrlhf.cli import UserError

# dtype names of safetensors -> (name in a .ckpt, NumPy dtype of the stored bytes). NumPy has no
# bfloat16: it is stored as uint16, the upper half of a float32
DTYPES: dict[str, tuple[str, np.dtype]] = {
    "F32": ("Float32", np.dtype("<f4")), "F16": ("Float16", np.dtype("<f2")),
    "BF16": ("BFloat16", np.dtype("<u2")), "F64": ("Float64", np.dtype("<f8")),
    "I64": ("Int64", np.dtype("<i8")), "I32": ("Int32", np.dtype("<i4")),
    "U8": ("UInt8", np.dtype("u1")), "I8": ("Int8", np.dtype("i1")),
    "BOOL": ("Bool", np.dtype("?"))}
LARGEST = {"F16": 65504.0, "BF16": 3.39e38, "F32": 3.40e38}
# elements that are read, converted, hashed and written at once; they fit the processor's cache.
# Fingerprints depend on this value
PIECE = 1 << 19
WORKERS = min(os.cpu_count() or 1, 8)  # threads; each holds a few pieces

Result = TypeVar("Result")
Values = Union[np.ndarray, Iterable[np.ndarray]]  # an array, or its flat pieces as in pieces()


class TensorSpec(NamedTuple):
    """What a file says about a tensor besides its values.

    Attributes:
        name: name of the parameter.
        dtype: a key of DTYPES.
        shape: may be empty.
    """
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return count_bytes(self.dtype, self.shape)


class TensorItem(NamedTuple):
    """A tensor to write.

    Attributes:
        name, dtype, shape: as in TensorSpec.
        make: returns the stored values; called once, when the tensor is written.
    """
    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Values]

    @classmethod
    def of_array(cls, name: str, dtype: str, array: np.ndarray) -> TensorItem:
        """An item whose values are in memory.

        Args:
            name: of the tensor.
            dtype: a key of DTYPES.
            array: the stored values; bfloat16 as uint16.
        """
        return cls(name, dtype, array.shape, lambda: array)

    @property
    def spec(self) -> TensorSpec:
        """The item without its values."""
        return TensorSpec(self.name, self.dtype, self.shape)


def map_in_order(function: Callable[..., Result],
                 jobs: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
    """Yield function(*job) for each job in order; several threads compute a little ahead of use."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            ahead.append(pool.submit(function, *job))
            if len(ahead) > 2 * WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def pieces(elements: int) -> list[tuple[int, int]]:
    """(first, count) of each piece of a tensor with that many elements."""
    return [(first, min(PIECE, elements - first)) for first in range(0, elements, PIECE)]


def count_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor in bytes."""
    return math.prod(shape) * DTYPES[dtype][1].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; no values are in memory.

    Attributes:
        name: name of the parameter.
        dtype: a key of DTYPES.
        shape: may be empty.
        file: the open file.
        spans: (offset, size) in bytes; joined they are the tensor's little-endian content.
    """
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: BinaryIO
    spans: tuple[tuple[int, int], ...]

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(size for _, size in self.spans)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, first: int, count: int) -> np.ndarray:
        """Stored values from element `first` on, shape (count,); bfloat16 as uint16."""
        out = np.empty(count, DTYPES[self.dtype][1])
        self._fill(out.view(np.uint8).data, first * out.itemsize)
        return out

    def array(self) -> np.ndarray:
        """All stored values; bfloat16 as uint16."""
        return self.read(0, self.elements).reshape(self.shape)

    def block(self, slices: tuple[slice, ...]) -> np.ndarray:
        """The stored values of a block: one slice(start, stop) for each dimension."""
        if not slices:
            return self.array()
        rows, inner = slices[0], math.prod(self.shape[1:])
        read = self.read(rows.start * inner, (rows.stop - rows.start) * inner)
        columns = (slice(None), *slices[1:])
        return read.reshape(-1, *self.shape[1:])[columns]

    def chunks(self) -> Iterator[np.ndarray]:
        """All stored values in order, one flat piece at a time."""
        for first, count in pieces(self.elements):
            yield self.read(first, count)

    def float32(self) -> np.ndarray:
        """The values as float32, exact for bfloat16 and float16."""
        return convert_dtype(self.array(), self.dtype, "F32")

    def _fill(self, view: memoryview, begin: int) -> None:
        """Fill a buffer with the content from byte `begin` on."""
        for offset, size in self.spans:
            if not view:
                break
            wanted = view[:max(size - begin, 0)]
            offset += begin
            begin, view = max(begin - size, 0), view[len(wanted):]
            while wanted:
                got = os.preadv(self.file.fileno(), [wanted], offset)
                if not got:
                    raise UserError(f"{self.file.name}: shrank while it was being read; "
                                    "download or copy it again")
                wanted, offset = wanted[got:], offset + got


def is_finite(array: np.ndarray, dtype: str) -> np.ndarray:
    """bool array: whether each stored value is neither NaN nor infinite."""
    if dtype in ("F32", "F64"):
        return np.isfinite(array)
    # infinity and NaN have all bits of the exponent set
    exponent = np.uint16({"F16": 0x7C00, "BF16": 0x7F80}[dtype])
    return (array.view(np.uint16) & exponent) != exponent


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored values to float32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to stored values of F32, F16 or BF16: to nearest, ties to even."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        lost = np.isnan(array)
        if not lost.any():
            return rounded
        return np.where(lost, ((bits >> 16) | 0x40).astype(np.uint16), rounded)
    with np.errstate(over="ignore"):  # the caller checks for inf
        return array.astype(DTYPES[dtype][1], copy=False)


@lru_cache
def _table(source: str, target: str) -> np.ndarray:
    """All 65,536 values of a 16-bit dtype in another dtype: a look-up is faster than computing."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[source][1])
    return round_to(to_float32(every, source), target)


def convert_dtype(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Convert stored values from one dtype to another, rounded to nearest.

    Args:
        array: as StoredTensor.read returns it.
        source: F32, F16 or BF16; any key of DTYPES if target is F32.
        target: F32, F16 or BF16.

    Returns:
        the stored values in the target's dtype.
    """
    if source == target:
        return array
    if source == "F16" or (source, target) == ("BF16", "F16"):
        # mode "wrap" releases the GIL, so other threads can run
        return _table(source, target).take(array.view(np.uint16), mode="wrap")
    return round_to(to_float32(array, source), target)
