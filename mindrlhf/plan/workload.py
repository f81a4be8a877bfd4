"""The data of a run: how many rows and pairs, at any length of row."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mindrlhf import cli
from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import UserError
from mindrlhf.data import features, groups, preference, row_length
from mindrlhf.data.mindrecord import read_data_sidecar
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

# positions that a CValues-like pair takes if it shares nothing; about 140 if three pairs share a
# prompt and its three answers
PAIR_TOKENS = 290
# of average length in a row, at least, where the pairs are not known one by one: the longest must
# fit, too, and few pairs leave gaps
PAIRS_IN_A_ROW = 4


@dataclass(frozen=True)
class Workload:
    """Rows of a length, and what is known about the pairs in them.

    Attributes:
        rows: how many.
        length: positions of a row, seq_length.
        pairs: in all rows; None if only the rows are known.
        sizes: of prompts, answers and pairs; None if they are not known one by one.
    """
    rows: int
    length: int
    pairs: int | None = None
    sizes: groups.Sizes | None = None
    _packed: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def rows_at(self, length: int) -> int:
        """Rows of another length: packed if the pairs are known, else filled as well as these."""
        if self.sizes is None:
            return ceil_div(self.rows * self.length, length)
        if length not in self._packed:
            found = row_length.count_rows(self.sizes, length, lambda _: 1)
            self._packed[length] = found.rows
        return self._packed[length]

    def pairs_per_row(self, length: int) -> float | None:
        """Mean number of pairs in a row of a length."""
        return None if self.pairs is None else self.pairs / self.rows_at(length)

    def fits(self, length: int) -> bool:
        """Whether rows of a length hold every pair, as far as it is known."""
        if self.sizes is not None:
            return row_length.longest_pair(self.sizes) <= length
        in_row = self.pairs_per_row(length)
        return in_row is None or in_row >= PAIRS_IN_A_ROW


def workload_of(settings: dict[str, Any], *, data: str | None = None,
                src: Sequence[str] | None = None, tokenizer: str | None = None,
                pairs: int | None = None, rows: int | None = None,
                pair_tokens: int | None = None) -> Workload | None:
    """The data that the options of the command describe; None without any.

    Args:
        settings: of the YAML.
        data: .mindrecord, with its sidecar beside it.
        src: files of pairs, as preprocessing takes them.
        tokenizer: tokenizer.model, for src.
        pairs: their number, if there is no file yet.
        rows: their number, if there is no file yet.
        pair_tokens: mean positions that a pair takes, for pairs.

    Raises:
        UserError: there is no such file, its rows are not of the YAML's seq_length, or an option
            lacks another one.
    """
    length = settings["model"]["model_config"]["seq_length"]
    if pair_tokens and not pairs:
        raise UserError("--pair_tokens: says how long the pairs of --pairs are; add --pairs N")
    if bool(src) != bool(tokenizer):
        raise UserError("--src and --tokenizer: the pairs are tokenized; give both or neither")
    if data:
        sidecar = read_data_sidecar(data)
        if sidecar["seq_len"] != length:
            raise UserError(f"{data}: has rows of {sidecar['seq_len']}, the YAML has seq_length "
                            f"{length}; give the YAML that trains on it")
        return Workload(sidecar["rows"], length, sidecar["pairs"]["written"])
    if src and tokenizer:
        return _tokenize_source(src, tokenizer, length)
    if pairs:
        per_row = max(1, length // (pair_tokens or PAIR_TOKENS))
        return Workload(ceil_div(pairs, per_row), length, pairs)
    return Workload(rows, length) if rows else None


def _tokenize_source(src: Sequence[str], path: str, length: int) -> Workload:
    """Tokenize files of pairs, and pack them into rows of a length.

    Args:
        src: files of pairs.
        path: tokenizer.model.
        length: positions of a row.

    Raises:
        UserError: a row is bad, or no pair fits into a row.
    """
    tokenizer, found = Glm4Tokenizer(path), []
    pairs = preference.read_pairs(src).pairs
    for pair in cli.progress_bar(len(pairs), "tokenize", "pair", iterable=pairs):
        tokens, _ = features.truncate_prompt(features.tokenize_pair(tokenizer, pair), length,
                                             tokenizer=tokenizer)
        if tokens is not None:
            found.append(tokens)
    if not found:
        raise UserError(f"{', '.join(src)}: no pair fits into {length} tokens; raise seq_length")
    sizes = groups.find_sequences(found, share=True).sizes
    rows = row_length.count_rows(sizes, length, lambda _: 1).rows
    return Workload(rows, length, len(found), sizes)
