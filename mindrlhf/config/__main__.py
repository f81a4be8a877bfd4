"""What the settings of a YAML are: python -m mindrlhf.config show CONFIG. Needs no MindSpore."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mindrlhf import cli, config
from mindrlhf.schema import RUN_MODES

EXAMPLE = "  python -m mindrlhf.config show finetune_glm4_9b.yaml"


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(
        "Print the settings of a YAML with everything that it inherits: each key and value, the "
        "file and line that it is from, or that it is a default, and whether it is used here or "
        "passed on to MindFormers; then the settings that something else replaces.", EXAMPLE)
    parse.add_argument("command", choices=("show",), metavar="show", help="what to do")
    parse.add_argument("config", metavar="CONFIG", help="YAML of any run_mode")
    return parse


def use_of(key: str) -> str:
    """What becomes of a setting."""
    first, _, rest = key.partition(".")
    here = first in (*config.HANDLED_HERE, *config.OWN_SECTIONS) or (
        first == "callbacks" and rest.split(".")[0] not in config.MINDFORMERS_CALLBACKS)
    return "used here" if here else "passed on"


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Where a setting is from: "file:line", or "default"."""
    parts = key.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    inner = [place for name, place in origins.items() if name.startswith(f"{key}.")]
    return next((origins[name] for name in names if name in origins), (*inner, "default")[0])


def describe(resolved: config.Resolved) -> list[str]:
    """The lines of the report."""
    files = list(dict.fromkeys(place.rpartition(":")[0] for place in resolved.origins.values()))
    names = {Path(file).name for file in files}
    short = {key: Path(place).name if len(names) == len(files) else place
             for key, place in resolved.origins.items()}
    changed = {each.key for each in resolved.replaced}
    rows = [(key, cli.shown(value), origin_of(key, short),
             "replaced, see below" if key in changed else use_of(key))
            for key, value in config.leaves(resolved.settings)]
    lines = [f"files: {', '.join(files)}; passed on: to MindFormers", *_aligned(rows)]
    if resolved.replaced:
        replaced = [(each.key, cli.shown(each.value), origin_of(each.key, short),
                     each.instead or "holds anyway") for each in resolved.replaced]
        lines += ["", "taken, but something else holds:", *_aligned(replaced)]
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the settings."""
    arguments = parser().parse_args(argv)
    cli.say(*describe(config.resolve(arguments.config, run_mode=RUN_MODES)))


if __name__ == "__main__":
    cli.run_command(main)
