"""Tensors as they lie in files: dtypes, reading piece by piece, the same values in other precisions."""
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from mindrlhf.cli import UserError

# dtype names of safetensors -> (name in a .ckpt, NumPy dtype of the stored bytes; a bfloat16 is the upper
# half of a float32 and has no NumPy dtype of its own)
DTYPES = {"F32": ("Float32", np.dtype("<f4")), "F16": ("Float16", np.dtype("<f2")),
          "BF16": ("BFloat16", np.dtype("<u2")), "F64": ("Float64", np.dtype("<f8")),
          "I64": ("Int64", np.dtype("<i8")), "I32": ("Int32", np.dtype("<i4")),
          "U8": ("UInt8", np.dtype("u1")), "I8": ("Int8", np.dtype("i1")), "BOOL": ("Bool", np.dtype("?"))}
LARGEST = {"F16": 65504.0, "BF16": 3.39e38, "F32": 3.40e38}
# elements read, converted, hashed and written at once; they fit a cache. Fingerprints depend on it
PIECE = 1 << 19
WORKERS = min(os.cpu_count() or 1, 8)  # threads; each holds a few pieces


def map_in_order(function, jobs):
    """function(*job) of each job, computed a little ahead of use by several threads, and given in order."""
    ahead = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            ahead.append(pool.submit(function, *job))
            if len(ahead) > 2 * WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def pieces(elements):
    """(first, count) of each piece of a tensor with that many elements."""
    return [(first, min(PIECE, elements - first)) for first in range(0, elements, PIECE)]


def count_bytes(dtype, shape):
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype][1].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Nothing of it is in memory.

    Attributes:
        name: the parameter's name.
        dtype: a key of DTYPES.
        shape: tuple of int.
        file: the open file.
        spans: tuple of (offset, size) in bytes; joined they are the tensor's little-endian content.
    """
    name: str
    dtype: str
    shape: tuple
    file: BinaryIO
    spans: tuple

    @property
    def nbytes(self):
        """Size in bytes."""
        return sum(size for _, size in self.spans)

    @property
    def elements(self):
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, first, count):
        """Stored values from element `first` on, NumPy (count,); bfloat16 as uint16."""
        out = np.empty(count, DTYPES[self.dtype][1])
        self._fill(memoryview(out.view(np.uint8)), first * out.itemsize)
        return out

    def array(self):
        """All stored values, NumPy; bfloat16 as uint16."""
        return self.read(0, self.elements).reshape(self.shape)

    def block(self, slices):
        """The stored values of a block, NumPy: slices is a tuple of slice(start, stop), one a dimension."""
        if not slices:
            return self.array()
        rows, inner = slices[0], math.prod(self.shape[1:])
        read = self.read(rows.start * inner, (rows.stop - rows.start) * inner)
        return read.reshape(-1, *self.shape[1:])[(slice(None), *slices[1:])]

    def chunks(self):
        """All stored values in order, a piece at a time."""
        for piece in pieces(self.elements):
            yield self.read(*piece)

    def float32(self):
        """The values as float32, exact for bfloat16 and float16."""
        return convert_dtype(self.array(), self.dtype, "F32")

    def _fill(self, view, begin):
        for offset, size in self.spans:
            if not view:
                break
            wanted = view[:max(size - begin, 0)]
            offset += begin
            begin, view = max(begin - size, 0), view[len(wanted):]
            while wanted:
                got = os.preadv(self.file.fileno(), [wanted], offset)
                if not got:
                    raise UserError(f"{self.file.name}: became shorter while it was read; fetch it again")
                wanted, offset = wanted[got:], offset + got


def is_finite(array, dtype):
    """bool array: whether each stored value is neither NaN nor infinite."""
    if dtype in ("F32", "F64"):
        return np.isfinite(array)
    exponent = np.uint16({"F16": 0x7C00, "BF16": 0x7F80}[dtype])  # all its bits set: infinite or NaN
    return (array.view(np.uint16) & exponent) != exponent


def to_float32(array, dtype):
    """Stored values -> float32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def round_to(array, dtype):
    """float32 values -> stored values of dtype F32, F16 or BF16, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        lost = np.isnan(array)
        return np.where(lost, ((bits >> 16) | 0x40).astype(np.uint16), rounded) if lost.any() else rounded
    with np.errstate(over="ignore"):  # the caller looks for inf
        return array.astype(DTYPES[dtype][1], copy=False)


@lru_cache
def _table(source, target):
    """The 65,536 values of a 16-bit dtype in another one; looking up is faster than computing."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[source][1])
    return round_to(to_float32(every, source), target)


def convert_dtype(array, source, target):
    """Stored values of one dtype -> stored values of another, rounded to nearest.

    Args:
        array: as StoredTensor.read gives it.
        source, target: F32, F16 or BF16 (source: any, where target is F32).
    """
    if source == target:
        return array
    if source == "F16" or (source, target) == ("BF16", "F16"):
        return _table(source, target).take(array.view(np.uint16), mode="wrap")  # lets other threads run
    return round_to(to_float32(array, source), target)
