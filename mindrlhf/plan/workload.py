"""The data of a run: how many rows and pairs, at any length of row."""
from __future__ import annotations

from typing import Any, NamedTuple

from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import UserError
from mindrlhf.data.mindrecord import read_data_sidecar

PAIR_TOKENS = 200  # of the longer side of a CValues pair, about


class Workload(NamedTuple):
    """Rows of a length, and the pairs in them if they are known.

    Attributes:
        rows: each has a chosen and a rejected side.
        length: of a side, seq_length.
        pairs: in all rows; None if only the rows are known.
    """
    rows: int
    length: int
    pairs: int | None = None

    def rows_at(self, length: int) -> int:
        """Rows of another length, filled as well as these."""
        return ceil_div(self.rows * self.length, length)

    def pairs_per_row(self, length: int) -> float | None:
        """Mean number of pairs in a row of a length."""
        return None if self.pairs is None else self.pairs / self.rows * length / self.length


def workload_of(settings: dict[str, Any], *, data: str | None = None, pairs: int | None = None,
                rows: int | None = None, pair_tokens: int | None = None) -> Workload | None:
    """The data that the options of the command describe; None without any.

    Args:
        settings: of the YAML.
        data: .mindrecord, with its sidecar beside it.
        pairs: their number, if there is no file yet.
        rows: their number, if there is no file yet.
        pair_tokens: mean length of the longer side of a pair, for pairs.

    Raises:
        UserError: there is no such file, or its rows are not of the YAML's seq_length.
    """
    length = settings["model"]["model_config"]["seq_length"]
    if pair_tokens and not pairs:
        raise UserError("--pair_tokens: says how long the pairs of --pairs are; add --pairs N")
    if data:
        sidecar = read_data_sidecar(data)
        if sidecar["seq_len"] != length:
            raise UserError(f"{data}: has rows of {sidecar['seq_len']}, the YAML has seq_length "
                            f"{length}; give the YAML that trains on it")
        return Workload(sidecar["rows"], length, sidecar["pairs"]["written"])
    if pairs:
        per_row = max(1, length // (pair_tokens or PAIR_TOKENS))
        return Workload(ceil_div(pairs, per_row), length, pairs)
    return Workload(rows, length) if rows else None
