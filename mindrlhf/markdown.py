"""Text of strangers in Markdown: it is shown as it is, and neither formats nor runs anything."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

KEPT = "\u200d\ufe0f"  # characters that join emoji


def visible(text: str) -> str:
    """Text on one line: control characters and those that change its direction become escapes."""
    return "".join(
        char if char.isprintable() or char in KEPT or unicodedata.category(char) == "Zs"
        else ascii(char)[1:-1] for char in text)


def code_span(value: object) -> str:
    """A value as inline code, on one line; | is escaped, so that it also stands in a table."""
    text = visible(str(value)).replace("|", "\\|") or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def fenced(text: str, kind: str = "text") -> str:
    """Text as a code block: no character of it is Markdown, and none controls a terminal."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = "\n".join(visible(line.replace("\t", "    ")) for line in text.split("\n"))
    return f"{fence}{kind}\n{lines}\n{fence}"


def as_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
