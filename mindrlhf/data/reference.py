"""The reference pass: log-probs of answers under the model as it is before training."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.cli import UserError
from mindrlhf.data.features import TokenGroup, TokenPair, row_inputs, tokenize_pair, truncate_prompt
from mindrlhf.data.groups import Sequences, find_sequences, group_sizes, make_groups, row_limits
from mindrlhf.data.packing import pack_groups
from mindrlhf.data.preference import Pair
from mindrlhf.data.scored import Part
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import INPUTS

if TYPE_CHECKING:
    from mindrlhf.models.glm4.network import Glm4DPO


NOT_FINITE = ("the model gives log-probs that are not finite; check the checkpoint and the YAML's "
              "compute_dtype")


class NotFiniteError(UserError):
    """NOT_FINITE.

    Attributes:
        pair: index of the first pair with such a log-prob.
    """

    def __init__(self, pair: int) -> None:
        super().__init__(NOT_FINITE)
        self.pair = pair


def make_part(tokenizer: Glm4Tokenizer, pairs: Sequence[Pair], numbers: Sequence[int], *,
              seq_len: int, score: Callable[[Sequences], np.ndarray],
              truncation: str = "keep_end", share: bool = True) -> Part:
    """Tokenize and score some pairs.

    Args:
        tokenizer: of the model.
        pairs: the pairs of the part.
        numbers: of these pairs among the source's pairs.
        seq_len: positions of a row.
        score: function from the distinct sequences to float32 (M,), log-prob of each answer.
        truncation: one of features.TRUNCATIONS.
        share: whether pairs with the same prompt share it.

    Raises:
        UserError: a log-prob is not finite; the message names the pair.
    """
    kept: list[TokenPair] = []
    kept_numbers: list[int] = []
    cut: list[int] = []
    dropped: list[int] = []
    for number, pair in zip(numbers, pairs):
        tokens, tokens_cut = truncate_prompt(tokenize_pair(tokenizer, pair), seq_len,
                                             tokenizer=tokenizer, truncation=truncation)
        if tokens is None:
            dropped.append(number)
        else:
            kept.append(tokens)
            kept_numbers.append(number)
            cut.append(tokens_cut)
    found = find_sequences(kept, share)
    try:
        logps = score(found) if kept else np.zeros(0, np.float32)
    except NotFiniteError as error:
        place = dict(zip(numbers, pairs))[kept_numbers[error.pair]].place
        raise UserError(f"{place}: {error}; if it is this pair alone, remove it") from None
    return Part.of(found, logps, numbers=kept_numbers, cut=cut, dropped=dropped)


class Scorer:
    """Reference log-probs of answers, batch by batch.

    Args:
        model: with its weights loaded.
        seq_len: positions of a row.
        batch_size: rows of a batch.
        pad_id: id of the padding token.
        packed: whether a row holds as many groups as fit, or one.
    """

    def __init__(self, model: Glm4DPO, *, seq_len: int, batch_size: int, pad_id: int,
                 packed: bool = True):
        from mindrlhf.models.glm4.network import ReferenceLogps
        self.limits = row_limits(seq_len)
        self.network = ReferenceLogps(model, self.limits.answers).set_train(False)
        self.seq_len, self.batch_size = seq_len, batch_size
        self.pad_id, self.packed = pad_id, packed

    def __call__(self, sequences: Sequences,
                 report: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Score every answer once.

        Args:
            sequences: of some pairs.
            report: called after each batch with the numbers of pairs and of positions so far.

        Returns:
            float32 (M,): log-prob of each answer, in nats, summed over the response tokens.

        Raises:
            NotFiniteError: a log-prob is not finite.
        """
        groups = make_groups(sequences.sizes, range(len(sequences.pairs)), self.limits)
        needs = group_sizes(sequences.sizes, groups)
        rows = pack_groups(needs, self.limits, packed=self.packed)
        logps = np.zeros(len(sequences.answers), np.float32)
        pairs = positions = 0
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin:begin + self.batch_size]
            result = self._run([[sequences.read(groups[number]) for number in row]
                                for row in batch])
            for row, values in zip(batch, result):
                answers = [answer for number in row for answer in groups[number].answers]
                logps[answers] = values[:len(answers)]
            done = needs[[number for row in batch for number in row]]
            pairs, positions = pairs + int(done[:, 2].sum()), positions + int(done[:, 0].sum())
            if report:
                report(pairs, positions)
        if not (finite := np.isfinite(logps)).all():
            raise NotFiniteError(int(finite[np.array(sequences.pairs)].all(1).argmin()))
        return logps

    def score_rows(self, rows: Sequence[Mapping[str, np.ndarray]],
                   report: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Score the answers of rows of training data, as they stand.

        Args:
            rows: the columns of each.
            report: as in __call__().

        Returns:
            float32 (rows, A): log-prob of each answer, nats; 0 where a row has none.

        Raises:
            UserError: a log-prob is not finite.
        """
        found, pairs, positions = [], 0, 0
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin:begin + self.batch_size]
            found.append(self._run_inputs(batch)[:len(batch)])
            pairs += sum(int((row["pair_ids"] >= 0).sum()) for row in batch)
            positions += sum(int((row["group_ids"] > 0).sum()) for row in batch)
            if report:
                report(pairs, positions)
        logps = np.concatenate(found)
        if not np.isfinite(logps).all():
            raise UserError(NOT_FINITE)
        return logps

    def score_pairs(self, pairs: Sequence[TokenPair]) -> np.ndarray:
        """Log-probs of each pair's chosen and rejected answer: float32 (N, 2), nats."""
        sequences = find_sequences(pairs, share=True)
        return self(sequences)[np.array(sequences.pairs)]

    def _run(self, rows: list[list[TokenGroup]]) -> np.ndarray:
        """Log-probs of the answers of at most batch_size rows: float32 (batch_size, A)."""
        return self._run_inputs([row_inputs(row, self.seq_len, self.pad_id) for row in rows])

    def _run_inputs(self, rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """As _run(), of model inputs."""
        from mindspore import Tensor
        empty = row_inputs([], self.seq_len, self.pad_id)
        rows = [*rows, *[empty] * (self.batch_size - len(rows))]
        columns = [Tensor(np.stack([row[name] for row in rows])) for name in INPUTS]
        return self.network(*columns).asnumpy()
