"""The training file: columns of a packed row, how it is written, and the sidecar that says what made it."""
import json
import shutil
from pathlib import Path

import numpy as np

from mindrlhf.cli import UserError, existing_file
from mindrlhf.data.features import row_columns
from mindrlhf.files import write_json
from mindrlhf.records import COLUMNS, SIDES

SIDECAR_FORMAT = 1


def make_row(pairs, logps, pair_ids, *, seq_len, width, pad_id):
    """One row.

    Args:
        pairs: list[TokenPair], at most width.
        logps: reference log-probs, (chosen, rejected) of each pair, nats.
        pair_ids: number of each pair in the source.
        seq_len: positions, S.
        width: pairs that the columns have room for, P.
        pad_id: id of the padding token.

    Returns:
        dict of arrays, in the order of COLUMNS: int32 (S,), float32 (P,), pair_ids int32 (P,), -1 for none.
    """
    row = {}
    for number, side in enumerate(SIDES):
        columns = row_columns(pairs, side, seq_len, pad_id)
        row |= {f"{side}_{name}": values for name, values in columns.items()}
        row[f"{side}_ref_logps"] = np.zeros(width, np.float32)
        row[f"{side}_ref_logps"][:len(pairs)] = [pair[number] for pair in logps]
    row["pair_ids"] = np.full(width, -1, np.int32)
    row["pair_ids"][:len(pairs)] = pair_ids
    return row


def write_rows(path, rows, *, seq_len, width, sidecar):
    """Write rows and sidecar. Nothing stands under the final name before all is written.

    MindSpore keeps a file's name inside its index, so the file is written under its name in a folder beside
    it, and then moved.

    Args:
        path: the .mindrecord; path + ".db" (MindSpore's index) and path + ".json" (the sidecar) come with it.
        rows: iterable of dicts as make_row() gives them.
        seq_len, width: S and P.
        sidecar: dict, what made the data.
    """
    from mindspore.mindrecord import FileWriter
    path = Path(path)
    workshop = path.with_name(f".{path.name}.writing")
    shutil.rmtree(workshop, ignore_errors=True)
    try:
        workshop.mkdir(parents=True)
        writer = FileWriter(str(workshop / path.name), 1, overwrite=True)
        sizes = {"seq_len": seq_len, "pairs": width}
        writer.add_schema({name: {"type": column.dtype, "shape": [sizes[column.size]]}
                           for name, column in COLUMNS.items()}, "packed preference pairs")
        for row in rows:
            writer.write_raw_data([row])
        writer.commit()
        path.unlink(missing_ok=True)
        shutil.move(workshop / f"{path.name}.db", path.with_name(f"{path.name}.db"))
        write_json(data_sidecar_path(path), {"format": SIDECAR_FORMAT, **sidecar})
        shutil.move(workshop / path.name, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def read_rows(path):
    """Rows of a training file, one after another: dicts of arrays.

    Raises:
        UserError: the file is none, or damaged.
    """
    from mindspore.mindrecord import FileReader
    reader = None
    try:
        reader = FileReader(str(path))
        yield from reader.get_next()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); preprocess again") from None
    finally:
        if reader:
            reader.close()


def data_sidecar_path(path):
    """Where the sidecar of a training file lies."""
    return Path(f"{path}.json")


def read_data_sidecar(path):
    """The sidecar of a training file.

    Raises:
        UserError: file, index or sidecar is missing or no such thing.
    """
    path = existing_file(path, "the data that dpo_preprocess_glm4_parallel.py made")
    existing_file(f"{path}.db", "the index that belongs to the .mindrecord")
    sidecar = existing_file(data_sidecar_path(path), "the sidecar that belongs to the .mindrecord")
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        if content["format"] != SIDECAR_FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {SIDECAR_FORMAT}")
        for key in ("seq_len", "pairs_per_row", "rows", "template", "tokenizer", "checkpoint", "pairs"):
            if key not in content:
                raise ValueError(f"no {key}")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{sidecar}: not a sidecar of training data ({error}); preprocess again") from None
    return content


def require_made_for(path, sidecar, *, seq_len, template, tokenizer, checkpoint):
    """Raise UserError unless data were made as training will use them, naming each difference.

    Args:
        path: of the data, for the message.
        sidecar: what read_sidecar gave.
        seq_len, template: of the run.
        tokenizer, checkpoint: fingerprints of the run's files; None is not compared.
    """
    pairs = [("seq_len", sidecar["seq_len"], seq_len), ("template", sidecar["template"], template),
             ("tokenizer", sidecar["tokenizer"]["sha256"], tokenizer),
             ("checkpoint", sidecar["checkpoint"]["fingerprint"], checkpoint)]
    differences = [f"{name} was {_short(made)} ({_file(sidecar, name)}), now {_short(now)}"
                   for name, made, now in pairs if now is not None and made != now]
    if differences:
        raise UserError(f"{path}: was not made for this run: {'; '.join(differences)}. Preprocess again with "
                        "what you train, or train with what you preprocessed")


def _short(value):
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value


def _file(sidecar, name):
    entry = sidecar.get(name)
    return entry["file"] if isinstance(entry, dict) else "in the data"
