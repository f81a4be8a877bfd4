"""The identity of a set of weights: the same whatever files, formats and order hold the tensors."""
from __future__ import annotations

import hashlib

import xxhash

from mindrlhf.checkpoints.tensors import map_in_order, pieces


class Fingerprint:
    """Identity of a set of weights, the same in whatever files, formats and order the tensors lie.

    SHA-256 over the digests of the tensors, sorted by name. The digest of a tensor is SHA-256 over the line
    "name dtype [shape]", then the XXH3 (128 bits) of each piece of 2**19 elements (tensors.PIECE) of its
    little-endian content. Pieces, so that all processors share the work on a large tensor. It tells weights
    apart; it is no proof against somebody who forges some.
    """

    def __init__(self):
        self.parts = {}

    def add(self, name, dtype, shape, digests):
        """Add a tensor: digests are those of its pieces, in order."""
        line = f"{name} {dtype} {list(shape)}\n".encode()
        self.parts[name] = hashlib.sha256(line + b"".join(digests)).digest()

    def hexdigest(self):
        """64 hex digits."""
        return hashlib.sha256(b"".join(self.parts[name] for name in sorted(self.parts))).hexdigest()


def digest(data):
    """XXH3 of the bytes of a piece."""
    return xxhash.xxh3_128_digest(data)


def fingerprint(tensors, *, sample=False, inspect=None):
    """Identity of a set of weights, as formats.Fingerprint defines it: of names, dtypes, shapes and values.

    Args:
        tensors: dict, name -> StoredTensor, of one file or of several.
        sample: only the first piece of each tensor: tells whether two checkpoints can be the same, at once.
        inspect: called with each tensor and the stored values of each of its pieces, from several threads.

    Returns:
        64 hex digits. Pieces are hashed side by side, as fast as they are read.
    """
    def some(tensor):
        return pieces(tensor.elements)[:1 if sample else None]

    def look(tensor, *piece):
        values = tensor.read(*piece)
        if inspect:
            inspect(tensor, values)
        return digest(values)

    identity = Fingerprint()
    digests = map_in_order(look, ((tensor, *piece) for tensor in tensors.values() for piece in some(tensor)))
    for tensor in tensors.values():
        identity.add(tensor.name, tensor.dtype, tensor.shape, [next(digests) for _ in some(tensor)])
    return identity.hexdigest()
