"""score.json: what run_mode score found out, as a typed record that other commands read."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindrlhf.cli import UserError
from mindrlhf.files import read_head
from mindrlhf.json_files import read_json, write_json

FORMAT = 1  # of score.json
RECORD, PAIRS, PICTURE = "score.json", "pairs.jsonl", "margins.png"  # the files of a score
PREFERENCES, CHOICES = "preferences", "multiple choice"  # kinds of scores
HALF = "a tie counts one half"  # the convention of every accuracy
CLUSTERED = "95 % Wilson interval with the effective number of pairs, clustered by prompt"


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen answer is better; a tie counts one half.

    Attributes:
        value: from 0 to 1.
        low, high: 95 % confidence interval, with pairs clustered by prompt.
        pairs: how many.
        prompts: how many different ones they have.
        ties: pairs with two equal values.
    """
    value: float
    low: float
    high: float
    pairs: int
    prompts: int
    ties: int


@dataclass(frozen=True)
class Mean:
    """A mean over pairs.

    Attributes:
        value: the mean.
        error: its standard error, with pairs clustered by prompt; None for a single prompt.
    """
    value: float
    error: float | None


@dataclass(frozen=True)
class Slice:
    """Some of the pairs.

    Attributes:
        name: what they have in common.
        accuracy: of them.
        margin: of them: chosen reward - rejected reward, or of log-probs where there are no
            rewards.
    """
    name: str
    accuracy: Accuracy
    margin: Mean


@dataclass(frozen=True)
class Score:
    """The result of run_mode score.

    Attributes:
        kind: PREFERENCES or CHOICES.
        run: identity of what was scored and how: SHA-256, 64 hex digits.
        data: file, content hash, counts.
        model: checkpoint, adapters and tokenizer with their fingerprints.
        reference: file and fingerprint of the reference weights; None for multiple choice.
        settings: beta, loss type and so on, as in the section dpo.
        versions: of MindSpore and MindFormers.
        accuracy: of all pairs; of multiple choice: of all questions in both orders.
        margin: of all pairs.
        metrics: TRL's name -> value, as the evaluation of a training prints them. In addition,
            reference_logps/*, as logps/*. Empty for multiple choice.
        slices: "type", "length", ... -> parts of the pairs.
    """
    kind: str
    run: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    accuracy: Accuracy
    margin: Mean
    metrics: Mapping[str, float]
    slices: Mapping[str, list[Slice]]


def find_record(path: str | Path) -> Path:
    """The score.json that a path means: itself, or the one in a folder."""
    return Path(path) / RECORD if Path(path).is_dir() else Path(path)


def load(path: str | Path) -> Score:
    """Read a score.

    Args:
        path: a score.json, or the folder that it is in.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = find_record(path)
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: is no score of this version of the project (format "
                        f"{content.get('format')}, not {FORMAT}); score again")
    try:
        fields = {name: content[name] for name in Score.__dataclass_fields__}
        fields |= {
            "accuracy": Accuracy(**content["accuracy"]), "margin": Mean(**content["margin"]),
            "slices": {by: list(map(_slice_of, found)) for by, found in content["slices"].items()}}
        return Score(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no complete score ({error}); score again") from None


def _slice_of(content: Mapping[str, Any]) -> Slice:
    """A slice from its JSON."""
    return Slice(content["name"], Accuracy(**content["accuracy"]), Mean(**content["margin"]))


def write_score(score: Score, path: str | Path) -> None:
    """Write a score.json, atomically and sealed."""
    about = {"conventions": {"accuracy": HALF, "interval": CLUSTERED}}
    write_json(path, {"format": FORMAT, **asdict(score), **about}, sealed=True)


def is_score(path: str | Path) -> bool:
    """Whether a file begins as write_score() begins it."""
    head = read_head(path)
    return b'"format"' in head and b'"kind"' in head and b'"run"' in head


def is_list_of_pairs(path: str | Path) -> bool:
    """Whether a file begins as pairs.jsonl does; a kill may leave it without its score.json."""
    return read_head(path).startswith((b'{"pair": ', b'{"place": '))
