"""Cards of training runs: python -m mindrlhf.card add|verify FOLDER. Needs no MindSpore."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mindrlhf import cli
from mindrlhf.card import add, verify

EXAMPLE = f"{add.EXAMPLE}\n{verify.EXAMPLE}"
COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {"add": add.main, "verify": verify.main}


def parser() -> cli.Parser:
    """The first word of the command line."""
    parse = cli.Parser(
        "Add results to the card of a training run, output/card, or verify what it says. Each "
        "command has a --help of its own.", EXAMPLE)
    parse.add_argument("command", choices=list(COMMANDS), help="what to do")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Call the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words[:1])
    COMMANDS[arguments.command](words[1:])


if __name__ == "__main__":
    cli.run_command(main)
