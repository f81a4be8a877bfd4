"""Fingerprints of weights: they do not depend on the files, formats and order of the tensors."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import xxhash

from mindrlhf.checkpoints.tensors import StoredTensor, TensorSpec, map_in_order, pieces


class Fingerprint:
    """The fingerprint of a set of weights, built tensor by tensor.

    It is SHA-256 over the digests of the tensors, sorted by name. The digest of a tensor is SHA-256
    over the line "name dtype [shape]", followed by the XXH3 (128 bits) of each piece of its
    little-endian content. A piece has 2**19 elements (tensors.PIECE), so several processors can
    hash one large tensor. A fingerprint tells weights apart; it does not protect against forgery.
    """

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}

    def add(self, spec: TensorSpec, digests: Iterable[bytes]) -> None:
        """Add a tensor, given the digests of its pieces in order."""
        line = f"{spec.name} {spec.dtype} {list(spec.shape)}\n".encode()
        self.parts[spec.name] = hashlib.sha256(line + b"".join(digests)).digest()

    def hexdigest(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(b"".join(self.parts[name] for name in sorted(self.parts))).hexdigest()


def digest(data: memoryview) -> bytes:
    """XXH3 (128 bits) of the bytes of a piece."""
    return xxhash.xxh3_128_digest(data)


def fingerprint(tensors: Mapping[str, StoredTensor], *, sample: bool = False,
                inspect: Callable[[StoredTensor, np.ndarray], object] | None = None) -> str:
    """Compute the fingerprint of names, dtypes, shapes and values, as Fingerprint defines it.

    Args:
        tensors: name -> tensor, of one file or of several.
        sample: hash only the first piece of each tensor: a quick test of two checkpoints.
        inspect: called from several threads with each tensor and the stored values of each piece.

    Returns:
        64 hex digits. Pieces are hashed in parallel, as fast as they are read.
    """
    def chosen(tensor: StoredTensor) -> list[tuple[int, int]]:
        return pieces(tensor.elements)[:1 if sample else None]

    def read_and_hash(tensor: StoredTensor, first: int, count: int) -> bytes:
        values = tensor.read(first, count)
        if inspect:
            inspect(tensor, values)
        return digest(values.data)

    identity = Fingerprint()
    jobs = ((tensor, *piece) for tensor in tensors.values() for piece in chosen(tensor))
    digests = map_in_order(read_and_hash, jobs)
    for tensor in tensors.values():
        identity.add(tensor.spec, [next(digests) for _ in chosen(tensor)])
    return identity.hexdigest()
