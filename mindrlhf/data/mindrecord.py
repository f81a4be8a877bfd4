"""The training file: builds a packed row, and writes and reads the file and its sidecar."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.cli import UserError, existing_file, rank
from mindrlhf.data.features import TokenPair, row_columns
from mindrlhf.files import Output, hash_file, read_head, remove_seal, staging_folder, write_json
from mindrlhf.records import COLUMNS, SIDES

SIDECAR_FORMAT = 1
HASHES = "xxh3_128"  # key of the sidecar: content hash of each file
HASHED = {"rows": "", "index": ".db"}  # name in the sidecar -> ending of the file's path
REQUIRED_KEYS = ("seq_len", "pairs_per_row", "rows", "template", "tokenizer", "checkpoint", "pairs")


def make_row(pairs: Sequence[TokenPair], logps: Sequence[Sequence[float]] | np.ndarray,
             pair_ids: Sequence[int], *, seq_len: int, width: int, pad_id: int
             ) -> dict[str, np.ndarray]:
    """Build one row.

    Args:
        pairs: at most `width` pairs.
        logps: reference log-probs, (chosen, rejected) of each pair, nats.
        pair_ids: row number of each pair in the source.
        seq_len: positions, S.
        width: pairs that the columns have room for, P.
        pad_id: id of the padding token.

    Returns:
        The columns in the order of COLUMNS: int32 (S,), float32 (P,) for log-probs, and pair_ids,
        int32 (P,), padded with -1.
    """
    row: dict[str, np.ndarray] = {}
    for number, side in enumerate(SIDES):
        columns = row_columns(pairs, side, seq_len, pad_id)
        row |= {f"{side}_{name}": values for name, values in columns.items()}
        row[f"{side}_ref_logps"] = np.zeros(width, np.float32)
        row[f"{side}_ref_logps"][:len(pairs)] = [pair[number] for pair in logps]
    row["pair_ids"] = np.full(width, -1, np.int32)
    row["pair_ids"][:len(pairs)] = pair_ids
    return row


def write_rows(path: str | Path, rows: Iterable[Mapping[str, np.ndarray]], *, seq_len: int,
               width: int, sidecar: Mapping[str, Any]) -> None:
    """Write rows, index and sidecar; the .mindrecord appears last, when everything is complete.

    MindSpore stores the file's name in its index, so the file is written under its final name in a
    staging folder and then moved.

    Args:
        path: the .mindrecord; path + ".db" (MindSpore's index) and path + ".json" (the sidecar) are
            written with it.
        rows: results of make_row().
        seq_len: S.
        width: P.
        sidecar: how the data were made.

    Raises:
        UserError: a file cannot be written.
    """
    from mindspore.mindrecord import FileWriter
    path = Path(path)
    sizes = {"seq_len": seq_len, "pairs": width}
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
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None


def read_rows(path: str | Path) -> Iterator[dict[str, np.ndarray]]:
    """Read the rows of a training file one by one.

    Raises:
        UserError: it is not a training file, or it is damaged.
    """
    from mindspore.mindrecord import FileReader
    reader = None
    try:
        reader = FileReader(str(path))
        yield from reader.get_next()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); preprocess "
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
            raise ValueError(f"format {content['format']}, expected {SIDECAR_FORMAT}")
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
