"""What differs between Ascend NPUs and the CPU, and between MindSpore 2.4 and 2.7: all of it, in one place.

MindFormers 1.3's GLM-4 does not run on a CPU as it stands. Each cure here is applied only where it is needed.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import time
from typing import Any

import mindspore as ms
from mindspore import nn, ops

from mindrlhf import cli

CLUSTER = ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "MS_NODE_RANK", "MS_TOPO_TIMEOUT")


def is_cpu():
    """Whether the context's device is the CPU."""
    return ms.get_context("device_target") == "CPU"


def quiet_mindformers():
    """Silence MindFormers' info lines and its print of the whole configuration. Call before anything of it logs."""
    from mindformers.tools.logger import get_logger
    from mindformers.trainer import base_trainer
    get_logger(stdout_level="WARNING", file_level=[], file_name=[]).setLevel("ERROR")
    base_trainer.pprint = lambda _: None


def versions():
    """Versions of what computes, for sidecars."""
    import mindformers
    return {"mindspore": ms.__version__, "mindformers": mindformers.__version__}


def start_device(config, *, parallel):
    """Set the device and, for a parallel run, join the other workers.

    Args:
        config: MindFormerConfig, changed in place as MindFormers expects it.
        parallel: False where each worker computes alone, or there is only one.
    """
    context = importlib.import_module("mindformers.core.context.build_context")
    from mindformers.tools.utils import set_output_path
    quiet_mindformers()
    if config.context.device_target == "CPU":
        from mindrlhf.cpu import operators, rules, sink
        for stand_in in (operators, rules, sink):
            stand_in.install()
    context.CONTEXT_INSTANCE = None  # MindFormers would keep the settings of an earlier start() of this process
    os.environ.pop("RUN_MODE", None)  # where it notes down that it predicts
    tensors_off_heap()
    set_output_path(config.output_dir)  # where the strategy of a plan goes; the Trainer sets it too late for that
    config.use_parallel = parallel
    config.context.device_id = int(os.environ.get("DEVICE_ID", 0))
    crowded = parallel and config.context.device_target == "CPU" and hasattr(os, "sched_setaffinity")  # Linux
    with _meeting() if crowded else contextlib.nullcontext():
        context.build_context(config)


@contextlib.contextmanager
def _meeting():
    """Let a CPU worker's threads take turns on one core while it joins the others.

    MindSpore's client notes down a connection after it has asked for it. On one machine the connection stands at once;
    a thread on another core then handles it too early, the attempt fails after 2.5 seconds, and so may the next: 8
    workers took 12 to 78 seconds to meet, and take 6 to 14 like this.
    """
    cores, mine = os.sched_getaffinity(0), int(os.environ.get("RANK_ID", 0))
    os.sched_setaffinity(0, {sorted(cores)[mine % len(cores)]})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a thread that wakes does not interrupt another
    try:
        yield
    finally:
        for task in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(task, cores)
                os.sched_setscheduler(task, os.SCHED_OTHER, os.sched_param(0))


def tensors_off_heap():
    """Let glibc map every block of 1 MiB or more by itself. Its limit grows to 32 MiB otherwise, and tensors lie among
    the small blocks of compiled graphs, whose gaps are lost. MindSpore keeps freed tensors itself: no time is lost."""
    mapping_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).mallopt(mapping_threshold, 1 << 20)


def seed_dataset(seed):
    """Seed the order of data sets that are opened from now on."""
    import mindspore.dataset as ds
    ds.config.set_seed(seed)


def leave_cluster():
    """Make this process independent of the launcher's cluster; the scheduler process, which has no work then, ends.

    MindSpore 2.4 takes a process for one of a cluster where MS_ROLE or MS_SCHED_HOST is set (UseDynamicCluster).
    MS_WORKER_NUM and RANK_ID stay: the project reads its share of the work from them.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        raise SystemExit(0)
    for name in CLUSTER:
        os.environ.pop(name, None)


def is_sharded():
    """Whether a parallel plan spreads operators over cards."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


class SumOverWorkers(nn.Cell):
    """Sum of a tensor over the data-parallel workers.

    In semi-auto parallel mode a sum over the batch is global already, and with one worker there is nothing to add.

    Attributes:
        factor: what a loss is multiplied by, so that the gradients are those of one worker. MindSpore takes the mean of
            the gradients of data-parallel workers. In a semi-auto parallel plan every card holds the loss and is a
            start of the backward pass; MindSpore adds these up, and divides only where the loss is returned alone
            (loss_repeated_mean), not beside metrics.
    """

    def __init__(self):
        super().__init__()
        mode, workers = ms.get_auto_parallel_context("parallel_mode"), cli.workers()
        alone = mode != "data_parallel" or workers == 1
        self.factor = workers if mode == "data_parallel" else 1 / workers if mode == "semi_auto_parallel" else 1
        self.all_reduce = nn.Identity() if alone else ops.AllReduce()

    def construct(self, tensor):
        """Any shape -> the same shape."""
        return self.all_reduce(tensor)


def evaluation_network(network):
    """A network as it must be called outside of training: in semi-auto parallel mode the batch is split first."""
    if not is_sharded():
        return network
    from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
    return _VirtualDatasetCell(network)


def unwrap_network(network):
    """What MindFormers' Trainer hands to a training step: (the network, how a batch is split over the cards).

    In semi-auto parallel mode it puts a cell around the network that splits its inputs and takes any number of them;
    value_and_grad needs the network itself, whose inputs are named.
    """
    split = getattr(network, "_virtual_dataset", None)
    return (network, None) if split is None else (network._backbone, split)


def peak_memory():
    """Most memory that this process held, bytes: of the device on an NPU, resident on the CPU."""
    if is_cpu():
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ms.hal.max_memory_allocated()


def end_worker(status=0):
    """End a data-parallel CPU worker when all workers have come this far; return on every other kind of run.

    Taking MindSpore's CPU cluster down in order crashes now and then, after all the work is done, and is noisy.
    """
    if cli.workers() == 1 or not is_cpu() or ms.get_auto_parallel_context("parallel_mode") != "data_parallel":
        return
    SumOverWorkers()(ms.Tensor([1.0], ms.float32)).asnumpy()
    sys.stdout.flush()
    sys.stderr.flush()
    if cli.rank():  # rank 0 hands the sum out, and waits for ever for the receipt of a worker that is gone
        time.sleep(1)
    os._exit(status)


def load_states_with(load):
    """Have MindFormers' Trainer call load(network, optimizer) where it would load a state itself, before it compiles."""
    from mindformers.trainer import base_trainer

    def load_instead(config, model, network, dataset, optimizer=None):  # noqa: ARG001  as the Trainer calls it
        load(network, optimizer)

    base_trainer.transform_and_load_checkpoint = load_instead


def resume_after(steps: int) -> None:
    """Have MindFormers' Trainer go on after so many optimizer steps, whether they were made in sink mode or not.

    MindFormers takes the epoch from the state, where it counts steps in sink mode and passes over the data otherwise.
    """
    from mindformers.trainer import base_trainer

    def load_context(config: Any, dataset: Any) -> None:
        runner = config.runner_config
        runner.initial_step = steps
        runner.initial_epoch = steps // (runner.sink_size if runner.sink_mode else dataset.get_dataset_size())

    base_trainer.load_resume_context_from_checkpoint = load_context


