"""The reference pass: log-probs of pairs under the model as it is before training."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.cli import UserError
from mindrlhf.data.features import TokenPair, row_columns, tokenize_pair, truncate_prompt
from mindrlhf.data.packing import max_pairs, pack_pairs
from mindrlhf.data.parts import Part, Parts, part_size  # noqa: F401  for callers of this pass
from mindrlhf.data.preference import Pair
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import INPUTS, SIDES

if TYPE_CHECKING:
    from mindrlhf.models.glm4.network import Glm4DPO


def make_part(tokenizer: Glm4Tokenizer, pairs: Sequence[Pair], first: int, *, seq_len: int,
              score: Callable[[list[TokenPair]], np.ndarray], truncation: str = "keep_end") -> Part:
    """Tokenize and score consecutive pairs.

    Args:
        tokenizer: of the model.
        pairs: the pairs of the part.
        first: number of the first of them among the source's pairs.
        seq_len: positions of a row.
        score: function from N pairs to float32 (N, 2), log-probs of chosen and rejected answers.
        truncation: one of features.TRUNCATIONS.
    """
    kept: list[TokenPair] = []
    numbers: list[int] = []
    cut: list[int] = []
    dropped: list[int] = []
    for number, pair in enumerate(pairs, first):
        tokens, tokens_cut = truncate_prompt(tokenize_pair(tokenizer, pair), seq_len,
                                             tokenizer=tokenizer, truncation=truncation)
        if tokens is None:
            dropped.append(number)
        else:
            kept.append(tokens)
            numbers.append(number)
            cut.append(tokens_cut)
    pieces = [piece for pair in kept for piece in (pair.prompt, pair.chosen, pair.rejected)]
    return Part(
        pairs=np.array(numbers, np.int32),
        lengths=np.array([len(piece) for piece in pieces], np.int32).reshape(-1, 3),
        tokens=np.array([token for piece in pieces for token in piece], np.int32),
        logps=score(kept) if kept else np.zeros((0, 2), np.float32),
        cut=np.array(cut, np.int32),
        dropped=np.array(dropped, np.int32))


class Scorer:
    """Reference log-probs of token pairs, batch by batch.

    Args:
        model: with its weights loaded.
        seq_len: positions of a row.
        batch_size: rows of a batch; the model sees both sides of each.
        pad_id: id of the padding token.
        packed: whether a row holds as many pairs as fit, or one.
    """

    def __init__(self, model: Glm4DPO, *, seq_len: int, batch_size: int, pad_id: int,
                 packed: bool = True):
        from mindrlhf.models.glm4.network import ReferenceLogps
        self.width = max_pairs(seq_len) if packed else 1
        self.network = ReferenceLogps(model, self.width).set_train(False)
        self.seq_len, self.batch_size = seq_len, batch_size
        self.pad_id, self.packed = pad_id, packed

    def __call__(self, pairs: Sequence[TokenPair],
                 report: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Score N pairs.

        Args:
            pairs: the pairs.
            report: called after each batch with the numbers of pairs and of their tokens so far.

        Returns:
            float32 (N, 2): log-probs of the chosen and the rejected answer, in nats, summed over
            the response tokens.

        Raises:
            UserError: a log-prob is not finite.
        """
        sides = np.array([[len(pair.prompt) + len(getattr(pair, side)) for side in SIDES]
                          for pair in pairs])
        rows = (pack_pairs(sides, self.seq_len) if self.packed
                else [[number] for number in range(len(pairs))])
        logps, done, tokens = np.zeros((len(pairs), 2), np.float32), 0, 0
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin:begin + self.batch_size]
            result = self._run([[pairs[number] for number in row] for row in batch])
            for place, row in enumerate(batch):
                logps[row] = result[:, place, :len(row)].T
                done, tokens = done + len(row), tokens + int(sides[row].sum())
            if report:
                report(done, tokens)
        if not np.isfinite(logps).all():
            raise UserError("the reference model gives log-probs that are not finite; check the "
                            "checkpoint and the YAML's compute_dtype")
        return logps

    def _run(self, rows: list[list[TokenPair]]) -> np.ndarray:
        """Log-probs of at most batch_size rows: float32 (2 sides, batch_size, P pairs)."""
        from mindspore import Tensor
        rows = rows + [[]] * (self.batch_size - len(rows))
        made = [row_columns(row, side, self.seq_len, self.pad_id) for side in SIDES for row in rows]
        columns = [Tensor(np.stack([row[name] for row in made])) for name in INPUTS]
        return self.network(*columns).asnumpy().reshape(2, self.batch_size, self.width)
