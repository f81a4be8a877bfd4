"""Run a command of the project with its semi-auto parallel plan on CPU processes: this, through the launcher,

    LD_PRELOAD=BUILD/librig_hook.so msrun_launcher.sh "on_cpu.py BUILD script.py options..." 8

where BUILD is the folder that build.sh prints.
"""
import importlib
import os
import runpy
import sys

build, script, *options = sys.argv[1:]
sys.argv = [script, *options]
sys.path[:0] = [os.path.dirname(os.path.abspath(script)), os.path.dirname(os.path.abspath(__file__))]
if os.environ.get("MS_ROLE") == "MS_WORKER":  # the scheduler compiles nothing
    os.environ.setdefault("GLOG_v", "3")
    context = importlib.import_module("mindformers.core.context.build_context")
    rig = importlib.import_module("rig")
    rig.allow(build, rig.PASSES_TARGET, "CPU")
    join = context.init

    def join_and_install():
        join()
        rig.install(build)

    context.init = join_and_install
runpy.run_path(script, run_name="__main__")
