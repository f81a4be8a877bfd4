"""The steps of rehearse.sh that need Python; mindrlhf/rehearsal.py does the work.

    rehearse.py shrink CONFIG PROCESS_YAML PREDICT_YAML CARDS FOLDER DEVICE
    rehearse.py compare FOLDER CARDS DEVICE
    rehearse.py explain OUTPUT LOG_DIR

Exit status: 1 if the plan is illegal, or if the two runs do not agree.
"""
from __future__ import annotations

import sys

from mindrlhf import cli, rehearsal


def shrink(path: str, process: str, predict: str, cards: str, folder: str, device: str) -> None:
    """Write the YAMLs of the rehearsal, with small sizes."""
    opened = rehearsal.open_rehearsal(path, int(cards), device)
    if problems := rehearsal.plan_problems(opened.settings, int(cards)):
        print(f"the plan is illegal: {'; '.join(problems)}")
        sys.exit(1)
    print(rehearsal.write_settings(opened, process, predict, folder))


def compare(folder: str, cards: str, device: str) -> None:
    """Compare the run on many cards with that in one process."""
    lines, problems = rehearsal.compare_runs(folder, int(cards), device)
    if lines:
        print(*lines, sep="\n")
    if problems:
        print("the plan does NOT compute what one process computes: " + "; ".join(problems))
        sys.exit(1)
    print(f"the plan is legal, and {cards} cards compute what one process computes")


def explain(output: str, log: str) -> None:
    """Say why a command failed."""
    print(rehearsal.explain_failure(output, log), file=sys.stderr)


def main() -> None:
    """Run one step."""
    step, *arguments = sys.argv[1:]
    if step == "shrink":
        shrink(*arguments)
    elif step == "compare":
        compare(*arguments)
    else:
        explain(*arguments)


if __name__ == "__main__":
    cli.run_command(main)
