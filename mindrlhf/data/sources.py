"""Files of preference data to JSON rows with line numbers: JSON lines or an array, gzip or not."""
from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mindrlhf.cli import UserError, existing_file

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SIDECAR = ".mindrecord.json"  # not data: --dst may lie in the folder that --src names
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRow(NamedTuple):
    """One row of a file.

    Attributes:
        line: line number, from 1.
        value: the parsed JSON, None if there is a problem.
        problem: why the line is not JSON, None if it is.
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
        paths: files and folders; a folder means the data files directly inside it.

    Raises:
        UserError: a path is missing, a folder holds no data, or a file is named twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(existing_file(path, "the preference pairs"))
            continue
        inside = [file for file in path.iterdir()
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


def read_json_rows(path: Path) -> Iterator[JsonRow]:
    """Read the rows of one file.

    A line that is not JSON becomes a row with a problem.

    Raises:
        UserError: the file cannot be read, or it is an array with a syntax error, after which
            nothing can be parsed.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            lines = cast(BinaryIO, file)
            yield from _array_rows(path, lines) if _is_array(lines) else _line_rows(lines)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _is_array(lines: BinaryIO) -> bool:
    """Whether a file starts with `[`; leaves the file at its start."""
    first = b" "
    while first and (first.isspace() or first in b"\xef\xbb\xbf"):  # space and a byte order mark
        first = lines.read(1)
    lines.seek(0)
    return first == b"["


def _line_rows(lines: BinaryIO) -> Iterator[JsonRow]:
    """Rows of JSON lines."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield JsonRow(number, json.loads(line.decode("utf-8-sig")), None)
        except (ValueError, RecursionError) as error:
            yield JsonRow(number, None, _describe(error) + "; each line must be one JSON object")


def _describe(error: Exception) -> str:
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
    decode, line, counted = json.JSONDecoder().raw_decode, 1, 0
    try:
        text = lines.read().decode("utf-8-sig")
        position = _skip_space(text, text.index("[") + 1)
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, position = decode(text, position)
            yield JsonRow(line, value, None)
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
