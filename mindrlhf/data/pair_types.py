"""Types of a pair's two answers, where the data name them, as CValues-Comparison does."""
from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.cli import UserError

FIELDS = ("pos_type", "neg_type")  # of a row: type of the better and of the worse answer
KEY = "types"  # of the sidecar of training data
NONE = 255  # a pair without a type
MOST, LONGEST = 100, 100  # types of a file, characters of a name; what exceeds them has no type


class PairTypes(NamedTuple):
    """The types of some pairs.

    Attributes:
        names: "type of the better answer > type of the worse one", in order of appearance.
        numbers: uint8 (N,), index of each pair's name, or NONE.
    """
    names: list[str]
    numbers: np.ndarray

    def name(self, pair: int) -> str | None:
        """Name of a pair's type."""
        number = int(self.numbers[pair])
        return None if number == NONE else self.names[number]


def number_type(row: Any, fields: Sequence[str], known: dict[str, int]) -> int:
    """Number of a row's type.

    Args:
        row: of the data.
        fields: that the row's format uses.
        known: name -> number; a new name is added.
    """
    values = [row.get(name) for name in FIELDS if name in fields]
    if len(values) < 2 or not all(isinstance(value, str) and value.strip() for value in values):
        return NONE
    name = " > ".join(values).encode("utf-8", "replace").decode()
    if len(name) > LONGEST or (name not in known and len(known) >= MOST):
        return NONE
    return known.setdefault(name, len(known))


def encode_types(types: PairTypes) -> dict[str, Any]:
    """What a sidecar says of the types of its pairs, which are in the order of their numbers."""
    if (types.numbers == NONE).all():
        return {}
    packed = base64.b64encode(zlib.compress(types.numbers.tobytes())).decode()
    return {KEY: {"names": types.names, "pairs": packed}}


def read_types(sidecar: Mapping[str, Any], path: str) -> PairTypes:
    """The types of the pairs of training data, in the order of their numbers.

    Args:
        sidecar: of the data; without types if the rows had none, or an older version wrote it.
        path: of the data, for messages.

    Raises:
        UserError: they are not those of the pairs.
    """
    pairs = sidecar["pairs"]["written"]
    if KEY not in sidecar:
        return PairTypes([], np.full(pairs, NONE, np.uint8))
    try:
        names = [str(name) for name in sidecar[KEY]["names"]]
        packed = base64.b64decode(sidecar[KEY]["pairs"], validate=True)
        numbers = np.frombuffer(zlib.decompressobj().decompress(packed, pairs + 1), np.uint8)
        if len(numbers) != pairs or ((numbers >= len(names)) & (numbers != NONE)).any():
            raise ValueError
    except (ValueError, TypeError, KeyError, binascii.Error, zlib.error):
        raise UserError(f"{path}.json: its {KEY} are not those of the pairs; preprocess "
                        "again") from None
    return PairTypes(names, numbers)
