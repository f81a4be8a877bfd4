"""Split a command into words as a shell does, and evaluate nothing.

    launcher_words.py COMMAND

Quotes and backslashes work as in bash. All else is plain text: $x, $(...), backticks, ; and *.
Each word is printed with a NUL after it; the last one is `end`. msrun_launcher.sh reads them.
"""
from __future__ import annotations

import os
import re
import sys

TOKEN = re.compile(r"""
    (?P<space>[ \t\r\n]+)
  | '(?P<single>[^']*)'
  | "(?P<double>(?:[^"\\]|\\.)*)"
  | \\(?P<escaped>.)
  | (?P<plain>[^ \t\r\n'"\\]+)
""", re.VERBOSE | re.DOTALL)
IN_DOUBLE = re.compile(r'\\([$`"\\\n])')  # a backslash is special before these only


def split(command: str) -> list[str]:
    """The words of a command.

    Raises:
        ValueError: a quote or a backslash at the end has no partner.
    """
    words: list[str] = []
    pieces: list[str] = []  # of the word that is being read
    at = 0
    while at < len(command):
        match = TOKEN.match(command, at)
        if not match:
            raise ValueError(f"unbalanced quotes in the command, from its character {at + 1} on")
        at, kind = match.end(), match.lastgroup or ""
        text = match[kind]
        if kind == "space":
            words += ["".join(pieces)] if pieces else []
            pieces = []
        elif kind == "double":
            pieces.append(IN_DOUBLE.sub(lambda found: found[1].strip("\n"), text))
        elif (kind, text) != ("escaped", "\n"):  # a backslash joins lines
            pieces.append(text)
    return [*words, "".join(pieces)] if pieces else words


if __name__ == "__main__":
    try:
        found = split(sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}; quote the command as a whole, and names with spaces in it")
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in [*found, "end"]))
