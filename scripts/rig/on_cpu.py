"""Run a command of the project with its semi-auto parallel plan on CPU processes.

    LD_PRELOAD=build/librig_hook.so python on_cpu.py BUILD script.py options...      (through the launcher)
"""
import os
import runpy
import sys

build, script, *options = sys.argv[1:]
sys.argv = [script, *options]
sys.path[:0] = [os.path.dirname(os.path.abspath(script)), os.path.dirname(os.path.abspath(__file__))]
if os.environ.get("MS_ROLE") in ("MS_WORKER",):
    os.environ.setdefault("GLOG_v", "3")
    import mindformers
    context = sys.modules["mindformers.core.context.build_context"]
    import rig
    join = context.init

    def join_and_install():
        join()
        rig.install(build)

    context.init = join_and_install
runpy.run_path(script, run_name="__main__")
