"""Files of preference data to rows of JSON with their places: JSON lines or one array, plain or gzip."""
import gzip
import json
import re
import zlib
from pathlib import Path

from mindrlhf.cli import UserError, existing_file

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SIDECAR = ".mindrecord.json"  # ours, should the data be written into the folder they come from
_SPACE = re.compile(r"[ \t\r\n]*")


def natural(path):
    """Sort key that puts part_2 before part_10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", str(path))]


def find_files(paths):
    """Files that paths name, in natural order.

    Args:
        paths: files and folders; a folder stands for the data files right in it.

    Raises:
        UserError: a path is missing, a folder holds no data, or a file is named twice.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(existing_file(path, "the preference pairs"))
            continue
        inside = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")
                  and file.name.endswith(SUFFIXES) and not file.name.endswith(SIDECAR)]
        if not inside:
            raise UserError(f"{path}: holds no data; files that end in {', '.join(SUFFIXES)} are read")
        files += [existing_file(file, "a file of preference pairs") for file in inside]
    files.sort(key=natural)
    seen = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: is named twice in --src; its pairs would count double")
        seen.add(file.resolve())
    return files


def read_json_rows(path):
    """Rows of one file.

    Returns:
        iterator of (line number from 1, parsed JSON, None), or (line number, None, why) for what is none.

    Raises:
        UserError: the file cannot be read, or it is an array with a mistake in it, behind which all is lost.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            yield from _array(path, lines) if _starts_array(lines) else _lines(lines)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _starts_array(lines):
    first = b" "
    while first and (first.isspace() or first in b"\xef\xbb\xbf"):  # blanks and a byte order mark
        first = lines.read(1)
    lines.seek(0)
    return first == b"["


def _lines(lines):
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig")), None
        except (ValueError, RecursionError) as error:
            yield number, None, _why(error) + "; each line holds one JSON object"


def _why(error):
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return f"not JSON ({'nested too deep' if isinstance(error, RecursionError) else error})"


def _array(path, lines):
    """Rows of a file that is one array, decoded one after another, so that each has its line number."""
    decode, line, counted = json.JSONDecoder().raw_decode, 1, 0
    try:
        text = lines.read().decode("utf-8-sig")
        place = _SPACE.match(text, text.index("[") + 1).end()
        while not text.startswith("]", place):
            line, counted = line + text.count("\n", counted, place), place
            row, place = decode(text, place)
            yield line, row, None
            place = _SPACE.match(text, place).end()
            if text.startswith(",", place):
                place = _SPACE.match(text, place + 1).end()
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("a comma or ] expected", text, place)
        place = _SPACE.match(text, place + 1).end()
        if place < len(text):
            raise json.JSONDecodeError("something follows the array", text, place)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise UserError(f"{path}:{line}: {_why(error)}; mend the array") from None
