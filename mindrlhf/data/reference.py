"""The reference pass: log-probs of every pair under the model as it is before training, shared out over workers.

The source is cut into parts of a fixed number of pairs, whatever the number of workers. A worker takes every n-th part,
packs and scores its pairs, and writes one file. So the result does not depend on how many workers there were, and a
run that was stopped goes on from its finished parts.
"""
import hashlib
import json
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindrlhf.checkpoint import atomic_file
from mindrlhf.cli import UserError
from mindrlhf.data.features import SIDES, TokenPair, fit, row_columns, tokenize
from mindrlhf.data.packing import max_pairs, pack

INPUTS = ("input_ids", "labels", "loss_mask", "segment_ids")


def part_size(pairs):
    """Pairs of a part: enough to fill rows, few enough that many cards finish together and little is lost by a kill."""
    return min(max(-(-pairs // 64), 8), 512)


class Parts:
    """The part files of a run, in a folder beside the destination.

    Args:
        destination: path of the training file.
        count: number of parts.
        identity: dict, all that the content of a part depends on.
    """

    def __init__(self, destination, count, identity):
        self.folder = Path(f"{destination}.parts")
        self.count = count
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def path(self, number):
        """Where a part lies."""
        return self.folder / f"part-{number:06d}.safetensors"

    def done(self):
        """How many parts are there."""
        return sum(self.path(number).exists() for number in range(self.count))

    def write(self, number, arrays):
        """Write one part; it takes its name when it is whole."""
        with atomic_file(self.path(number)) as file:
            file.write(save(arrays, {"run": self.run}))

    def is_done(self, number):
        """Whether a part is there.

        Raises:
            UserError: it is of another run, or no part.
        """
        path = self.path(number)
        if not path.exists():
            return False
        try:
            with safe_open(path, "np") as part:
                if part.metadata().get("run") == self.run:
                    return True
        except (SafetensorError, AttributeError):
            pass
        raise UserError(f"{path}: left by a run with other data, checkpoint or options; remove {self.folder}, or give "
                        "another --dst")

    def wait(self, progress, poll=0.1):
        """Return when every part is there; progress(number of parts) is called meanwhile."""
        while (done := self.done()) < self.count:
            progress(done)
            time.sleep(poll)
        progress(done)

    def read(self):
        """All parts, one after another: dicts of arrays."""
        for number in range(self.count):
            self.is_done(number)
            with safe_open(self.path(number), "np") as part:
                yield {name: part.get_tensor(name) for name in part.keys()}

    def remove(self):
        """Delete the parts and, if nothing else is in it, their folder."""
        for number in range(self.count):
            self.path(number).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            pass


def make_part(tokenizer, pairs, first, *, seq_len, score):
    """Tokenize and score some pairs.

    Args:
        tokenizer: Glm4Tokenizer.
        pairs: list[Pair].
        first: number of the first of them in the source.
        seq_len: positions of a row.
        score: function from list[TokenPair] to float32 (N, 2), log-probs of the chosen and the rejected answers.

    Returns:
        dict of arrays: pair_ids (N,), lengths (N, 3) of prompt, chosen, rejected, tokens of all one after another,
        logps (N, 2), cut (N,) prompt tokens cut away, dropped (M,) numbers of pairs that no row can hold.
    """
    kept, pair_ids, cut, dropped = [], [], [], []
    for number, pair in enumerate(pairs, first):
        tokens, shortened = fit(tokenize(tokenizer, pair), seq_len)
        if tokens is None:
            dropped.append(number)
        else:
            kept.append(tokens)
            pair_ids.append(number)
            cut.append(shortened)
    parts = [part for tokens in kept for part in (tokens.prompt, tokens.chosen, tokens.rejected)]
    return {"pair_ids": np.array(pair_ids, np.int32), "lengths": np.array([*map(len, parts)], np.int32).reshape(-1, 3),
            "tokens": np.array([token for part in parts for token in part], np.int32),
            "logps": score(kept) if kept else np.zeros((0, 2), np.float32), "cut": np.array(cut, np.int32),
            "dropped": np.array(dropped, np.int32)}


def split_tokens(part):
    """The TokenPairs of a part, as arrays that are views of it."""
    pieces = np.split(part["tokens"], np.cumsum(part["lengths"].ravel())[:-1]) if part["lengths"].size else []
    return [TokenPair(*pieces[start:start + 3]) for start in range(0, len(pieces), 3)]


class Scorer:
    """Reference log-probs of token pairs, batch by batch.

    Args:
        model: Glm4DPO with its weights loaded.
        seq_len: positions of a row.
        batch_size: rows at once; a batch holds both sides of them.
        pad_id: id of the padding token.
    """

    def __init__(self, model, *, seq_len, batch_size, pad_id):
        from mindrlhf.models.glm4.dpo import ReferenceLogps
        self.width = max_pairs(seq_len)
        self.network = ReferenceLogps(model, self.width).set_train(False)
        self.seq_len, self.batch_size, self.pad_id = seq_len, batch_size, pad_id

    def __call__(self, pairs):
        """list[TokenPair] -> float32 (N, 2): sums over the response tokens of the chosen and the rejected answer, nats.

        Raises:
            UserError: a log-prob is not finite.
        """
        rows = pack([[len(pair.prompt) + len(getattr(pair, side)) for side in SIDES] for pair in pairs], self.seq_len)
        logps = np.zeros((len(pairs), 2), np.float32)
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin:begin + self.batch_size]
            result = self._run([[pairs[number] for number in row] for row in batch])
            for place, row in enumerate(batch):
                logps[row] = result[:, place, :len(row)].T
        if not np.isfinite(logps).all():
            raise UserError("the reference model gives log-probs that are not finite; check the checkpoint and its dtype")
        return logps

    def _run(self, rows):
        """Rows of pairs -> float32 (2, batch_size, P)."""
        from mindspore import Tensor
        rows = rows + [[]] * (self.batch_size - len(rows))
        columns = []
        for side in SIDES:
            made = [row_columns(row, side, self.seq_len, self.pad_id) for row in rows]
            columns += [Tensor(np.stack([row[name] for row in made])) for name in INPUTS]
        return self.network(*columns).asnumpy().reshape(2, self.batch_size, self.width)
