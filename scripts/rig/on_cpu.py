"""Run a command of the project with its semi-auto parallel plan on CPU processes, by the launcher:

    LD_PRELOAD=BUILD/librig_hook.so msrun_launcher.sh "on_cpu.py BUILD script.py options..." 8

BUILD is the folder that build.sh prints.
"""
from __future__ import annotations

import importlib
import os
import runpy
import sys


def prepare(build: str) -> None:
    """Make this worker compile for the rig's target; install the rig when the workers have met."""
    os.environ.setdefault("GLOG_v", "3")
    context = importlib.import_module("mindformers.core.context.build_context")
    rig = importlib.import_module("rig")
    rig.allow(build, rig.PASSES_TARGET, "CPU")
    join = vars(context)["init"]

    def join_and_install() -> None:
        join()
        rig.install(build)

    vars(context)["init"] = join_and_install


def main() -> None:
    """Run the script as the main program."""
    build, script, *options = sys.argv[1:]
    sys.argv = [script, *options]
    sys.path[:0] = [os.path.dirname(os.path.abspath(path)) for path in (script, __file__)]
    if os.environ.get("MS_ROLE") == "MS_WORKER":  # the scheduler compiles nothing
        prepare(build)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
