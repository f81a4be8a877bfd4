"""The training file: builds a packed row, and writes and reads the file and its sidecar."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.cli import UserError, existing_file, rank
from mindrlhf.data import groups, packing
from mindrlhf.data.features import TokenGroup, TokenPair, row_inputs
from mindrlhf.files import hash_file, read_head, require_file_size, staging_folder
from mindrlhf.json_files import remove_seal, write_json
from mindrlhf.outputs import Output
from mindrlhf.records import COLUMNS

SMALLEST = 48 << 20  # bytes of a .mindrecord, with holes; under a lower limit, the writer crashes
SIDECAR_FORMAT = 2
HASHES = "xxh3_128"  # key of the sidecar: content hash of each file
HASHED = {"rows": "", "index": ".db"}  # name in the sidecar -> ending of the file's path
REQUIRED_KEYS = ("seq_len", "answers_per_row", "pairs_per_row", "rows", "template", "tokenizer",
                 "checkpoint", "pairs")


def make_row(members: Sequence[TokenGroup], *, pad_id: int, **sizes: int) -> dict[str, np.ndarray]:
    """Build one row.

    Args:
        members: prompts with answers, reference log-probs and pairs.
        pad_id: id of the padding token.
        sizes: of the columns: seq_len, answers and pairs, see records.Column.

    Returns:
        The columns of COLUMNS. Answers are numbered through all groups of the row.
    """
    row = {name: np.full(sizes[column.size], column.filler, column.dtype)
           for name, column in COLUMNS.items()}
    row |= row_inputs(members, sizes["seq_len"], pad_id)
    answers = pairs = 0
    for group in members:
        own = slice(answers, answers + len(group.answers))
        row["reference_logps"][own] = group.logps
        row["answer_tokens"][own] = list(map(len, group.answers))
        for place, pair in enumerate(group.pairs, pairs):
            row["chosen"][place] = answers + pair.chosen
            row["rejected"][place] = answers + pair.rejected
            row["pair_ids"][place] = pair.number
        answers, pairs = answers + len(group.answers), pairs + len(group.pairs)
    return row


def make_rows(pairs: Sequence[TokenPair], logps: np.ndarray, *, seq_len: int, pad_id: int,
              share: bool = True, packed: bool = True) -> list[dict[str, np.ndarray]]:
    """Build the rows of some pairs in memory; a pair's number is its index.

    Args:
        pairs: the pairs.
        logps: float (N, 2), reference log-probs of chosen and rejected answers, nats.
        seq_len: positions, S.
        pad_id: id of the padding token.
        share: whether pairs with the same prompt share it.
        packed: whether a row holds as many groups as fit, or one.
    """
    found, limits = groups.find_sequences(pairs, share), groups.row_limits(seq_len)
    references = np.zeros(len(found.answers), np.float32)
    references[np.array(found.pairs, int).reshape(-1, 2)] = logps
    made = groups.make_groups(found.sizes, range(len(pairs)), limits)
    rows = packing.pack_groups(groups.group_sizes(found.sizes, made), limits, packed=packed)
    sizes = {"answers": max(sum(len(made[k].answers) for k in row) for row in rows),
             "pairs": max(sum(len(made[k].pairs) for k in row) for row in rows)}
    return [make_row([found.read(made[k], references) for k in row], seq_len=seq_len,
                     pad_id=pad_id, **sizes) for row in rows]


def column_sizes(sidecar: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a file's columns, as Column.size names them."""
    return {"seq_len": sidecar["seq_len"], "answers": sidecar["answers_per_row"],
            "pairs": sidecar["pairs_per_row"]}


def write_rows(path: str | Path, rows: Iterable[Mapping[str, np.ndarray]],
               sidecar: Mapping[str, Any]) -> None:
    """Write rows, index and sidecar; the .mindrecord appears last, when everything is complete.

    MindSpore stores the file's name in its index, so the file is written under its final name in a
    staging folder and then moved.

    Args:
        path: the .mindrecord; path + ".db" (MindSpore's index) and path + ".json" (the sidecar) are
            written with it.
        rows: results of make_row().
        sidecar: how the data were made.

    Raises:
        UserError: a file cannot be written.
    """
    from mindspore.mindrecord import FileWriter
    path = Path(path)
    require_file_size(path, SMALLEST)
    sizes = column_sizes(sidecar)
    schema = {name: {"type": column.dtype, "shape": [sizes[column.size]]}
              for name, column in COLUMNS.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(path) as folder:
            writer = FileWriter(str(folder / path.name), 1, overwrite=True)
            writer.add_schema(schema, "packed preference pairs")
            for row in rows:
                writer.write_raw_data([row])
            writer.commit()
            hashes = {name: hash_file(folder / f"{path.name}{end}")
                      for name, end in HASHED.items()}
            path.unlink(missing_ok=True)
            shutil.move(folder / f"{path.name}.db", path.with_name(f"{path.name}.db"))
            write_json(data_sidecar_path(path),
                       {"format": SIDECAR_FORMAT, **sidecar, HASHES: hashes}, sealed=True)
            shutil.move(folder / path.name, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({_cause(error)}); make room on its disk, or "
                        "give another path") from None


def _cause(error: Exception) -> str:
    """What MindSpore says went wrong, in one line, or what the system says."""
    lines = str(error).splitlines() or [type(error).__name__]
    marked = [line.rpartition("]")[2].strip() for line in lines if line.startswith("[ERROR]")]
    return (marked or lines)[0]


def read_rows(path: str | Path, columns: Sequence[str] | None = None
              ) -> Iterator[dict[str, np.ndarray]]:
    """Read the rows of a training file one by one.

    Args:
        path: of the .mindrecord.
        columns: that are read; None: all.

    Raises:
        UserError: it is not a training file, or it is damaged.
    """
    from mindspore.mindrecord import FileReader
    reader = None
    try:
        reader = FileReader(str(path), columns=None if columns is None else list(columns))
        yield from reader.get_next()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({_cause(error)}); preprocess "
                        "again") from None
    finally:
        if reader:
            reader.close()


def data_sidecar_path(path: str | Path) -> Path:
    """Path of a training file's sidecar."""
    return Path(f"{path}.json")


def read_data_sidecar(path: str | Path) -> dict[str, Any]:
    """Read the sidecar of a training file.

    Raises:
        UserError: file, index or sidecar is missing, or the sidecar is damaged.
    """
    path = existing_file(path, "the data that dpo_preprocess_glm4_parallel.py made")
    existing_file(f"{path}.db", "the index that belongs to the .mindrecord")
    sidecar = existing_file(data_sidecar_path(path), "the sidecar that belongs to the .mindrecord")
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        if content["format"] != SIDECAR_FORMAT:
            raise UserError(f"{path}: was made by another version of this project (format "
                            f"{content['format']}, not {SIDECAR_FORMAT}); preprocess again")
        for key in REQUIRED_KEYS:
            if key not in content:
                raise ValueError(f"no {key}")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{sidecar}: not a sidecar of training data ({error}); preprocess "
                        "again") from None
    remove_seal(sidecar, content)
    return content


def data_outputs(path: str | Path) -> list[Output]:
    """The files of a training file: rows, index and sidecar."""
    return [Output(Path(path), "a MindRecord", _is_mindrecord),
            Output(Path(f"{path}.db"), "the index of a MindRecord",
                   lambda path: read_head(path).startswith(b"SQLite format 3\0")),
            Output(data_sidecar_path(path), "the sidecar of training data",
                   lambda path: all(word in read_head(path) for word in (b'"format"', b'"rows"')))]


def _is_mindrecord(path: Path) -> bool:
    """Whether a file begins as MindSpore begins its MindRecords: size of a JSON header, header."""
    head = read_head(path)
    return head[8:10] == b'{"' and b'"header_size"' in head


def find_damage(path: str | Path, sidecar: Mapping[str, Any]) -> str | None:
    """Compare the rows and the index of a training file with the hashes in its sidecar.

    Args:
        path: of the .mindrecord.
        sidecar: the result of read_data_sidecar(path).

    Returns:
        what is wrong, in one line, or None.
    """
    recorded = sidecar.get(HASHES)
    if not isinstance(recorded, dict):
        return (f"{data_sidecar_path(path)}: has no {HASHES}, the content hash of the data; "
                "preprocess again")
    for name, end in HASHED.items():
        if recorded.get(name) != hash_file(f"{path}{end}"):
            return (f"{path}{end}: was changed or damaged after preprocessing: its content hash is "
                    "not the one in the sidecar; remove it and preprocess again")
    return None


def require_unchanged(path: str | Path, sidecar: Mapping[str, Any]) -> None:
    """Check the content of a training file before MindSpore opens it; only rank 0 reads it.

    MindSpore's reader checks nothing: a flipped bit may end the process or change a log-prob.

    Args:
        path: of the .mindrecord.
        sidecar: the result of read_data_sidecar(path).

    Raises:
        UserError: rows or index are not as they were written, or the sidecar has no hashes.
    """
    problem = find_damage(path, sidecar) if rank() == 0 else None
    if problem:
        raise UserError(problem)


def require_made_for(path: str | Path, sidecar: Mapping[str, Any], *, seq_len: int | None,
                     template: str | None, tokenizer: str | None, checkpoint: str | None) -> None:
    """Raise UserError, naming each difference, unless the data match the run. None is not compared.

    Args:
        path: of the data, for the message.
        sidecar: the result of read_data_sidecar(path).
        seq_len: of the run.
        template: template.VERSION.
        tokenizer: fingerprint of the run's tokenizer.
        checkpoint: fingerprint of the run's checkpoint.
    """
    comparisons = (
        ("seq_len", sidecar["seq_len"], seq_len),
        ("template", sidecar["template"], template),
        ("tokenizer", sidecar["tokenizer"]["sha256"], tokenizer),
        ("checkpoint", sidecar["checkpoint"]["fingerprint"], checkpoint))
    differences = [f"{name} was {_short(made)} ({_origin(sidecar, name)}), now {_short(now)}"
                   for name, made, now in comparisons if now is not None and made != now]
    if differences:
        raise UserError(f"{path}: was not made for this run: {'; '.join(differences)}. Preprocess "
                        "again with the model to train, or train the model of the data")


def _short(value: Any) -> Any:
    """A value for a message, hashes abbreviated."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value


def _origin(sidecar: Mapping[str, Any], name: str) -> str:
    """The file that a value of the sidecar describes, for a message."""
    entry = sidecar.get(name)
    return entry["file"] if isinstance(entry, dict) else "in the data"
