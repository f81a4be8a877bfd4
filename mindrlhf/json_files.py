"""JSON files: strict, and sealed with a hash of their content."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from mindrlhf.cli import UserError
from mindrlhf.files import atomic_file

SEAL = "seal"  # key of a JSON file whose value is the hash of all others


def write_json(path: str | Path, content: dict[str, Any], *, sealed: bool = False) -> None:
    """Write a JSON file, atomically.

    Args:
        path: of the file.
        content: of the file.
        sealed: add a hash of the content, which read_json compares.
    """
    if sealed:
        content = {**content, SEAL: _seal_of(content)}
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def _seal_of(content: dict[str, Any]) -> str:
    """XXH3 (128 bits) of JSON values, 32 hex digits."""
    as_read = json.loads(json.dumps(content))  # tuples are lists, keys are strings
    return xxhash.xxh3_128_hexdigest(json.dumps(as_read, sort_keys=True).encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file, without the seal.

    Raises:
        UserError: it is not a JSON object, a key appears twice, or the seal does not fit.
    """
    content = read_unsealed(path)
    remove_seal(path, content)
    return content


def read_unsealed(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file with its seal, which is not compared.

    Raises:
        UserError: it is not a JSON object, or a key appears twice.
    """
    def require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"{key!r} appears twice")
            content[key] = value
        return content

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=require_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; download "
                        "it again")
    return content


def remove_seal(path: str | Path, content: dict[str, Any]) -> None:
    """Remove the seal from the content of a JSON file, if it has one.

    Raises:
        UserError: the seal does not fit the content.
    """
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _seal_of(content):
        raise UserError(f"{path}: was changed or damaged after it was written; copy it again, or, "
                        f"if you changed it on purpose, remove its {SEAL!r}")
