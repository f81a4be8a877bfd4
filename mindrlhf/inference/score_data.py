"""What run_mode score scores: rows of preprocessing, files of pairs, or multiple choice."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindrlhf import cli
from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import containers
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, preference, reference, sources
from mindrlhf.data.features import TokenPair
from mindrlhf.data.groups import find_sequences
from mindrlhf.data.pair_types import PairTypes, read_types
from mindrlhf.data.parts import split_pairs
from mindrlhf.data.passes import Report
from mindrlhf.data.preference import Pair
from mindrlhf.data.reference import Scorer
from mindrlhf.data.scored import Part, Scored
from mindrlhf.data.validation import read_answers
from mindrlhf.files import hash_file
from mindrlhf.inference import multiple_choice
from mindrlhf.inference.multiple_choice import Quiz
from mindrlhf.inference.score_record import CHOICES, PREFERENCES
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import SIDES

SUFFIX = ".mindrecord"
FEWEST, MOST = 8, 64  # rows of a part, a multiple of the first: they fill usual batches


class ScoreData(Protocol):
    """Pairs, in parts that are scored one by one.

    Attributes:
        kind: PREFERENCES or CHOICES.
        files: that they are in.
        about: what score.json says of them.
        parts: how many.
        pairs: how many, including those that do not fit into a row.
        rows: of a .mindrecord, else None.
        seq_len: positions of their rows; None: as the YAML says.
        made_with: file and fingerprint of the weights whose log-probs they hold, or None.
    """
    kind: str
    files: list[str]
    about: dict[str, Any]
    parts: int
    pairs: int
    rows: int | None
    seq_len: int | None
    made_with: dict[str, Any] | None

    def part(self, number: int, scorer: Scorer | None, report: Report) -> Part:
        """Score a part; parts are asked for in ascending order. None: all log-probs are 0."""

    def references(self) -> np.ndarray:
        """The log-probs that the pairs hold, float32 (N, 2), in the order of their numbers."""

    def types(self, scored: Scored) -> PairTypes:
        """The types of scored pairs."""

    def describe(self, scored: Scored, pair: int) -> dict[str, Any]:
        """Which pair of the data a scored pair is: number and, of files, place."""

    def tokens(self, scored: Scored) -> int | None:
        """Tokens of all rows, if the data say it."""


class RowData:
    """A .mindrecord from preprocessing.

    Args:
        path: of the file.
        tokenizer: of the model.
    """

    kind = PREFERENCES

    def __init__(self, path: str, tokenizer: Glm4Tokenizer):
        self.path, self.sidecar = path, mindrecord.read_data_sidecar(path)
        self.files = [path, f"{path}.db", f"{path}.json"]
        mindrecord.require_unchanged(path, self.sidecar)
        mindrecord.require_made_for(path, self.sidecar, seq_len=None, template=template.VERSION,
                                    tokenizer=tokenizer.fingerprint, checkpoint=None)
        self.rows: int | None = self.sidecar["rows"]
        self.each = min(FEWEST * ceil_div(self.sidecar["rows"], 64 * FEWEST), MOST)
        self.parts = ceil_div(self.sidecar["rows"], self.each)
        self.pairs = self.sidecar["pairs"]["written"]
        self.seq_len: int | None = self.sidecar["seq_len"]
        self.made_with: dict[str, Any] | None = dict(self.sidecar["checkpoint"])
        self.about = {"file": path, "hash": self.sidecar.get(mindrecord.HASHES, {}).get("rows"),
                      "rows": self.rows, "read": self.pairs, "dropped": {}}
        self._types = read_types(self.sidecar, path)
        self._stream: Iterator[dict[str, np.ndarray]] = iter(())
        self._next = -1  # row of the stream

    def part(self, number: int, scorer: Scorer | None, report: Report) -> Part:
        """As in ScoreData."""
        rows = list(self._rows(number * self.each, (number + 1) * self.each))
        width = self.sidecar["answers_per_row"]
        values = (scorer.score_rows(rows, report) if scorer
                  else np.zeros((len(rows), width), np.float32))
        pairs, numbers, logps = [], [], []
        for row, own in zip(rows, values):
            answers = read_answers(row)
            for place, pair in enumerate(row["pair_ids"].tolist()):
                if pair >= 0:
                    chosen, rejected = (answers[row[side][place]] for side in SIDES)
                    pairs.append(TokenPair(chosen.prompt, chosen.response, rejected.response))
                    numbers.append(pair)
                    logps.append([own[row[side][place]] for side in SIDES])
        found = find_sequences(pairs, share=True)
        of_answers = np.zeros(len(found.answers), np.float32)
        of_answers[np.array(found.pairs)] = logps
        return Part.of(found, of_answers, numbers=numbers, cut=[0] * len(pairs), dropped=[])

    def _rows(self, begin: int, end: int) -> Iterator[dict[str, np.ndarray]]:
        """Rows from begin to before end. The file is read once while begin grows."""
        if not 0 <= self._next <= begin:
            self._stream, self._next = mindrecord.read_rows(self.path), 0
        while self._next < end:
            row = next(self._stream, None)
            if row is None:
                return
            self._next += 1
            if self._next > begin:
                yield row

    def references(self) -> np.ndarray:
        """As in ScoreData."""
        columns = ("reference_logps", "chosen", "rejected", "pair_ids")
        numbers, logps = [], []
        for row in mindrecord.read_rows(self.path, columns):
            own = row["pair_ids"] >= 0
            numbers.append(row["pair_ids"][own])
            logps.append(np.stack([row["reference_logps"][row[side][own]]
                                   for side in SIDES], 1))
        return np.concatenate(logps)[np.argsort(np.concatenate(numbers), kind="stable")]

    def types(self, scored: Scored) -> PairTypes:  # noqa: ARG002
        """As in ScoreData."""
        return self._types

    def describe(self, scored: Scored, pair: int) -> dict[str, Any]:
        """As in ScoreData."""
        return {"pair": int(scored.numbers[pair])}

    def tokens(self, scored: Scored) -> int | None:  # noqa: ARG002
        """As in ScoreData."""
        return self.sidecar.get("tokens")


class TextData:
    """Pairs of text.

    Args:
        kind: PREFERENCES or CHOICES.
        pairs: the pairs.
        files: that they are from.
        tokenizer: of the model.
        batch_positions: of a batch.
        truncation: as in features.truncate_prompt().
        names: of the pairs' types.
        about: more to say of them.
    """

    rows: int | None = None
    seq_len: int | None = None
    made_with: dict[str, Any] | None = None

    def __init__(self, kind: str, pairs: Sequence[Pair], files: Sequence[Path],
                 tokenizer: Glm4Tokenizer, *, batch_positions: int, truncation: str,
                 names: Sequence[str] = (), **about: Any):
        self.kind, self.all, self.tokenizer = kind, pairs, tokenizer
        self.truncation, self.names = truncation, list(names)
        self.files = list(map(str, files))
        self.members = split_pairs(pairs, share=True, batch_positions=batch_positions)
        self.parts, self.pairs = len(self.members), len(pairs)
        content = hashlib.sha256()
        for file in files:
            content.update(bytes.fromhex(hash_file(file, hashlib.sha256)))
        self.about = {"file": ", ".join(map(str, files)), "hash": content.hexdigest(), **about}

    def part(self, number: int, scorer: Scorer | None, report: Report) -> Part:
        """As in ScoreData."""
        assert scorer is not None  # texts hold no log-probs
        members = self.members[number]
        return reference.make_part(self.tokenizer, [self.all[member] for member in members],
                                   members, seq_len=scorer.seq_len, truncation=self.truncation,
                                   score=lambda found: scorer(found, report))

    def references(self) -> np.ndarray:
        """As in ScoreData."""
        raise UserError(f"{self.about['file']}: pairs of text have no reference log-probs; add "
                        "--reference_checkpoint, the weights that training started from, or "
                        "preprocess them with these weights and score the .mindrecord")

    def types(self, scored: Scored) -> PairTypes:
        """As in ScoreData."""
        numbers = np.array([pair.type for pair in self.all], np.uint8)
        return PairTypes(self.names, numbers[scored.numbers])

    def describe(self, scored: Scored, pair: int) -> dict[str, Any]:
        """As in ScoreData."""
        found = self.all[scored.numbers[pair]]
        return {"pair": found.number, "place": found.place}

    def tokens(self, scored: Scored) -> int | None:  # noqa: ARG002
        """As in ScoreData."""
        return None


class ChoiceData(TextData):
    """Multiple choice.

    Args:
        quiz: the questions.
        tokenizer: of the model.
        batch_positions: of a batch.
    """

    def __init__(self, quiz: Quiz, tokenizer: Glm4Tokenizer, batch_positions: int):
        super().__init__(CHOICES, quiz.pairs, quiz.files, tokenizer,
                         batch_positions=batch_positions, truncation="drop", read=quiz.rows,
                         one_order=quiz.one_order,
                         trials=multiple_choice.count_forms(quiz.trials))
        self.quiz = quiz

    def describe(self, scored: Scored, pair: int) -> dict[str, Any]:
        """As in ScoreData."""
        trial = self.quiz.trials[scored.numbers[pair]]
        return {"place": self.all[scored.numbers[pair]].place, "form": trial.form,
                "question": trial.question, "label": trial.label}


def open_score_data(path: str, tokenizer: Glm4Tokenizer, dataset_type: str | None, *,
                    batch_positions: int) -> ScoreData:
    """Find out what a path holds, and open it.

    Args:
        path: of --score_data.
        tokenizer: of the model.
        dataset_type: of --dataset_type, or None.
        batch_positions: of a batch, for pairs of text.

    Raises:
        UserError: it is nothing that can be scored.
    """
    rows_kind = mindrecord.data_outputs(path)[0]
    if Path(path).suffix == SUFFIX or (Path(path).is_file() and rows_kind.is_kind(Path(path))):
        if dataset_type:
            raise UserError(f"--dataset_type is for files of pairs, and {path} is a {SUFFIX}; "
                            "leave it out")
        return RowData(path, tokenizer)
    if Path(path).suffix in containers.SUFFIXES:
        raise UserError(f"{path}: is a checkpoint; --score_data takes a {SUFFIX} or preference "
                        "pairs, and --load_checkpoint the weights")
    files = sources.find_files([path])
    first = next(iter(sources.read_file_rows(files[0])), None)
    if not dataset_type and first and not first.problem and multiple_choice.is_choice(first.value):
        return ChoiceData(multiple_choice.read_quiz(files), tokenizer, batch_positions)
    source = preference.read_pairs([path], dataset_type or "auto")
    cli.say(f"{path}: {len(source.pairs):,} pairs, --dataset_type {source.dataset_type}")
    return TextData(PREFERENCES, source.pairs, source.files, tokenizer,
                    batch_positions=batch_positions, truncation="keep_end", names=source.types,
                    read=source.read, dataset_type=source.dataset_type)
