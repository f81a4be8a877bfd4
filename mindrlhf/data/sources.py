"""Files of preference data to rows with line numbers.

JSON lines, a JSON array, CSV, parquet and folders of datasets' save_to_disk; gzip and zstd.
"""
from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import jsonlines

from mindrlhf.cli import UserError, existing_file

PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (".jsonl", ".json", ".csv") for packed in PACKED),
            ".parquet", ".arrow")
LONGEST_SPACE = 1 << 20  # bytes before the [ of an array
LONGEST_LINE, LARGEST_ARRAY = 64 << 20, 4 << 30  # bytes, decompressed
LONGEST_CELL = 2 ** 31 - 1  # characters of a CSV cell
SIDECAR = ".mindrecord.json"  # not data: --dst may lie in the folder that --src names
_SPACE = re.compile(r"[ \t\r\n]*")
_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


class JsonRow(NamedTuple):
    """One row of a file.

    Attributes:
        line: line number, from 1.
        value: the parsed JSON, or the same from another format; None if there is a problem.
        problem: why the row cannot be read, None if it can.
    """
    line: int
    value: Any
    problem: str | None


def natural(path: Path) -> list[int | str]:
    """Sort key that puts part_2 before part_10."""
    pieces = re.split(r"(\d+)", str(path))
    return [int(piece) if piece.isdecimal() else piece for piece in pieces]


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """List the files that paths name, in natural order.

    Args:
        paths: files and folders; a folder means the data files directly inside it, or the dataset
            that save_to_disk wrote there.

    Raises:
        UserError: a path is missing, a folder holds no data, or a file is named twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(existing_file(path, "the preference pairs"))
            continue
        inside = _saved_dataset(path) or [
            file for file in path.iterdir()
            if file.is_file() and not file.name.startswith(".")
            and file.name.endswith(SUFFIXES) and not file.name.endswith(SIDECAR)]
        if not inside:
            raise UserError(f"{path}: holds no data; expected files in {', '.join(SUFFIXES)}")
        files += [existing_file(file, "a file of preference pairs") for file in inside]
    files.sort(key=natural)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: is named twice in --src; its pairs would count twice")
        seen.add(file.resolve())
    return files


def _saved_dataset(folder: Path) -> list[Path]:
    """Files of a dataset that save_to_disk wrote into a folder; none if it holds something else."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if len(splits) != 1:
            raise UserError(f"{folder}: holds the splits {', '.join(splits) or '(none)'}; name the "
                            f"folder of one, such as {folder / (splits or ['train'])[0]}")
        folder = folder / splits[0]
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return []
    try:
        listed = json.loads(state.read_bytes())["_data_files"]
        return [folder / Path(file["filename"]).name for file in listed]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{state}: does not list the files of a dataset; save it again with "
                        "save_to_disk") from None


def read_file_rows(path: Path) -> Iterator[JsonRow]:
    """Read the rows of one file; its suffix names the format, and JSON is the default.

    A line that cannot be read becomes a row with a problem.

    Raises:
        UserError: the file cannot be read, or has a fault after which nothing can be parsed.
    """
    kind = (path.with_suffix("").suffix if path.suffix in PACKED else path.suffix).lower()
    try:
        yield from READERS.get(kind, _json_rows)(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_bytes(path: Path) -> BinaryIO:
    """Open a file, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _pyarrow(path: Path) -> Any:
    """The module pyarrow, with which a file is read."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: {path.suffix} files need pyarrow, which is not installed; run "
                        "pip install pyarrow, or save the data as .jsonl") from None
    return pyarrow


def _json_rows(path: Path) -> Iterator[JsonRow]:
    """Rows of JSON lines or of an array: it starts with `[`, after space and byte order mark."""
    with _open_bytes(path) as lines:
        first = lines.read(LONGEST_SPACE).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    with _open_bytes(path) as lines:
        yield from (_array_rows if first == b"[" else _line_rows)(path, lines)


def _require_distinct(names: Sequence[str], path: Path) -> None:
    """Refuse a table with two columns of one name."""
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names a column twice ({', '.join(names)}); rename one")


def _csv_rows(path: Path) -> Iterator[JsonRow]:
    """Rows of a CSV file whose first line names the fields."""
    csv.field_size_limit(LONGEST_CELL)
    line = 1
    try:
        with _open_bytes(path) as lines, io.TextIOWrapper(lines, "utf-8-sig", newline="") as text:
            cells = csv.reader(text, strict=True)
            names = next(cells, [])
            _require_distinct(names, path)
            line = cells.line_num + 1
            for row in cells:
                if row:
                    yield _csv_row(line, names, row)
                line = cells.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_describe(error)}") from None
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV ({error}); quote cells that hold commas, quotes "
                        "or line breaks") from None


def _csv_row(line: int, names: Sequence[str], cells: Sequence[str]) -> JsonRow:
    """A row of CSV; cells that hold lists of messages are decoded."""
    if len(cells) != len(names):
        return JsonRow(line, None, f"{len(cells)} cells, but the first line names {len(names)}; "
                                   "quote cells that hold commas")
    value: dict[str, Any] = {}
    for name, cell in zip(names, cells):
        try:
            value[name] = json.loads(cell) if _MESSAGES.match(cell) else cell
        except ValueError:
            return JsonRow(line, None, f"'{name}' holds messages that are not JSON; save the data "
                                       "as .jsonl")
    return JsonRow(line, value, None)


def _arrow_rows(path: Path) -> Iterator[JsonRow]:
    """Rows of a parquet file, or of an .arrow file of datasets; they are numbered from 1."""
    arrow = _pyarrow(path)
    try:
        with open(path, "rb") as file:
            if path.suffix == ".arrow":
                batches = arrow.ipc.open_stream(file)
                names = batches.schema.names
            else:
                table = arrow.parquet.ParquetFile(file)
                batches, names = table.iter_batches(), table.schema_arrow.names
            _require_distinct(names, path)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield JsonRow(number, row, None)
    except ValueError as error:  # pyarrow.ArrowInvalid is one
        raise UserError(f"{path}: not a complete {path.suffix} file "
                        f"({' '.join(str(error).split())}); copy it again") from None


class RowDecoder(json.JSONDecoder):
    """Decodes JSON, and notes a key that stands twice in an object: json would take the last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._make_object)
        self.repeated: str | None = None

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        return made

    def row(self, line: int, value: Any) -> JsonRow:
        """The row of the value just decoded."""
        name, self.repeated = self.repeated, None
        if name is None:
            return JsonRow(line, value, None)
        return JsonRow(line, None, f"has the key {name!r} twice; remove one")


def _line_rows(path: Path, lines: BinaryIO) -> Iterator[JsonRow]:
    """Rows of JSON lines."""
    decoder, line = RowDecoder(), 0

    def counted() -> Iterator[bytes]:
        nonlocal line
        try:
            while text := lines.readline(LONGEST_LINE + 1):
                line += 1
                if len(text) > LONGEST_LINE:  # a few KB of .gz can become gigabytes
                    raise UserError(f"{path}:{line}: has more than {LONGEST_LINE >> 20} MB; each "
                                    "line must be one JSON object")
                yield text
        except EOFError as error:  # a gzip file is cut; jsonlines would take it for the end
            raise gzip.BadGzipFile(str(error)) from None

    with jsonlines.Reader(counted(), loads=lambda text: decoder.decode(str(text))) as reader:
        while True:
            try:
                value = reader.read(allow_none=True, skip_empty=True)
            except EOFError:
                return
            except (jsonlines.InvalidLineError, RecursionError) as error:
                decoder.repeated = None
                problem = _describe(error.__cause__ or error)
                yield JsonRow(line, None, f"{problem}; each line must be one JSON object")
            else:
                yield decoder.row(line, value)


def _describe(error: BaseException) -> str:
    """What is wrong with text that does not parse."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return f"not JSON ({'nested too deeply' if isinstance(error, RecursionError) else error})"


def _skip_space(text: str, position: int) -> int:
    """Position of the first character at or after `position` that is not white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _array_rows(path: Path, lines: BinaryIO) -> Iterator[JsonRow]:
    """Rows of a file that is one array, decoded one at a time, so that each has its line number."""
    decoder, line, counted = RowDecoder(), 1, 0
    try:
        content = lines.read(LARGEST_ARRAY + 1)
        if len(content) > LARGEST_ARRAY:
            raise UserError(f"{path}: an array of more than {LARGEST_ARRAY >> 30} GB is not read "
                            "into memory; save the data as .jsonl")
        text = content.decode("utf-8-sig")
        position = _skip_space(text, text.index("[") + 1)
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            yield decoder.row(line, value)
            position = _skip_space(text, position)
            if text.startswith(",", position):
                position = _skip_space(text, position + 1)
            elif not text.startswith("]", position):
                raise json.JSONDecodeError("expected a comma or ]", text, position)
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("unexpected text after the array", text, position)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise UserError(f"{path}:{line}: {_describe(error)}; fix the array") from None


READERS = {".csv": _csv_rows, ".parquet": _arrow_rows, ".arrow": _arrow_rows}
