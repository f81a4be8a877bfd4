"""Everything that differs between Ascend NPUs and the CPU, and between MindSpore 2.4 and 2.7.

MindFormers 1.3's GLM-4 does not run on a CPU unchanged. Each workaround is applied only where it is
needed; cpu/__init__.py lists those that replace something in MindFormers or MindSpore.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf import cli

CLUSTER = ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "MS_NODE_RANK",
           "MS_TOPO_TIMEOUT")


def is_cpu() -> bool:
    """Whether the context's device is the CPU."""
    return ms.get_context("device_target") == "CPU"


def quiet_mindformers() -> None:
    """Silence MindFormers' info lines and its print of the full configuration.

    Call it before any module of MindFormers logs.
    """
    from mindformers.tools.logger import get_logger
    from mindformers.trainer import base_trainer
    get_logger(stdout_level="WARNING", file_level=[], file_name=[]).setLevel("ERROR")
    base_trainer.pprint = lambda _: None


def versions() -> dict[str, str]:
    """Versions of MindSpore and MindFormers, for sidecars."""
    import mindformers
    return {"mindspore": ms.__version__, "mindformers": mindformers.__version__}


def start_device(config: Any, *, parallel: bool) -> None:
    """Set the device and, for a parallel run, join the other workers.

    Args:
        config: MindFormerConfig. It is changed in place, as MindFormers expects.
        parallel: False where each worker computes alone, or there is only one.
    """
    context: Any = importlib.import_module("mindformers.core.context.build_context")
    from mindformers.tools.utils import set_output_path
    quiet_mindformers()
    if config.context.device_target == "CPU":
        from mindrlhf.cpu import operators, rules, sink
        for stand_in in (operators, rules, sink):
            stand_in.install()
    context.CONTEXT_INSTANCE = None  # else settings of an earlier start in this process remain
    os.environ.pop("RUN_MODE", None)  # MindFormers sets it when it predicts
    tensors_off_heap()
    # The strategy of a plan is written there. The Trainer sets the path too late for that.
    set_output_path(config.output_dir)
    config.use_parallel = parallel
    config.context.device_id = int(os.environ.get("DEVICE_ID", 0))
    on_linux = hasattr(os, "sched_setaffinity")
    one_core = parallel and config.context.device_target == "CPU" and on_linux
    with _joining_on_one_core() if one_core else contextlib.nullcontext():
        context.build_context(config)


@contextlib.contextmanager
def _joining_on_one_core() -> Iterator[None]:
    """Run a CPU worker's threads on one core while it joins the other workers.

    MindSpore's client registers a connection only after it has requested it. On one machine the
    connection opens at once. A thread on another core then handles it before it is registered, the
    attempt fails after 2.5 seconds, and so may the next. Joining took 8 workers 12 to 78 seconds;
    on one core each it takes 6 to 14.
    """
    cores, rank = os.sched_getaffinity(0), int(os.environ.get("RANK_ID", 0))
    os.sched_setaffinity(0, {sorted(cores)[rank % len(cores)]})
    # SCHED_BATCH: a thread that wakes up does not preempt the running one
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        for task in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(task, cores)
                os.sched_setscheduler(task, os.SCHED_OTHER, os.sched_param(0))


def tensors_off_heap() -> None:
    """Make glibc map every block of 1 MiB or more separately.

    By default the threshold grows to 32 MiB, so tensors end up among the small blocks of compiled
    graphs, and the gaps between them are lost. This costs no time, because MindSpore keeps freed
    tensors in a pool of its own.
    """
    mapping_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).mallopt(mapping_threshold, 1 << 20)


def seed_dataset(seed: int) -> None:
    """Seed the order of data sets that are opened from now on."""
    import mindspore.dataset as ds
    ds.config.set_seed(seed)


def leave_cluster() -> None:
    """Make this process independent of the launcher's cluster. The scheduler process exits.

    MindSpore 2.4 joins a cluster if MS_ROLE or MS_SCHED_HOST is set (UseDynamicCluster).
    MS_WORKER_NUM and RANK_ID stay: the project reads its share of the work from them.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        raise SystemExit(0)
    for name in CLUSTER:
        os.environ.pop(name, None)


def is_sharded() -> bool:
    """Whether a parallel plan shards operators over cards."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


class SumOverWorkers(nn.Cell):
    """Sum of a tensor over the data-parallel workers.

    In semi-auto parallel mode a sum over the batch is already global, and one worker has nothing to
    add. In both cases the cell returns its input.

    Attributes:
        factor: multiplier of a loss that makes the gradients those of one worker. In data-parallel
            mode MindSpore averages the gradients of the workers. In semi-auto parallel mode every
            card holds the loss and starts a backward pass. MindSpore adds these up, and divides
            only if the loss is returned alone (loss_repeated_mean), not with metrics.
    """

    def __init__(self) -> None:
        super().__init__()
        mode, workers = ms.get_auto_parallel_context("parallel_mode"), cli.workers()
        alone = mode != "data_parallel" or workers == 1
        self.factor = (workers if mode == "data_parallel"
                       else 1 / workers if mode == "semi_auto_parallel" else 1)
        self.all_reduce = nn.Identity() if alone else ops.AllReduce()

    def construct(self, tensor: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return self.all_reduce(tensor)


def evaluation_network(network: nn.Cell) -> nn.Cell:
    """The network to call outside of training. In semi-auto parallel mode it splits the batch."""
    if not is_sharded():
        return network
    from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
    return _VirtualDatasetCell(network)


def unwrap_network(network: nn.Cell) -> tuple[nn.Cell, Any]:
    """Undo the Trainer's wrapping of the network that it passes to a training step.

    In semi-auto parallel mode MindFormers' Trainer wraps the network in a cell that splits the
    inputs and takes any number of them. value_and_grad needs the network itself, whose inputs are
    named.

    Returns:
        (the network, the operator that splits a batch over the cards, or None).
    """
    split = getattr(network, "_virtual_dataset", None)
    return (network, None) if split is None else (network._backbone, split)


def peak_memory() -> int:
    """Peak memory of this process in bytes: device memory on an NPU, resident memory on the CPU."""
    if is_cpu():
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ms.hal.max_memory_allocated()


def end_worker(status: int = 0) -> None:
    """Exit a worker of a CPU cluster once all workers arrive here; return on every other run.

    An orderly shutdown of MindSpore's CPU cluster sometimes crashes after all work is done, and is
    noisy.
    """
    mode = ms.get_auto_parallel_context("parallel_mode")
    if cli.workers() == 1 or not is_cpu() or mode == "stand_alone":
        return
    ms.reset_auto_parallel_context()  # SumOverWorkers adds up in data-parallel mode alone
    ms.set_auto_parallel_context(parallel_mode="data_parallel")
    SumOverWorkers()(ms.Tensor([1.0], ms.float32)).asnumpy()
    sys.stdout.flush()
    sys.stderr.flush()
    if cli.rank():  # rank 0 sends the sum, and waits forever for the receipt of an ended worker
        time.sleep(1)
    os._exit(status)


def load_states_with(load: Callable[[nn.Cell, Any], object]) -> None:
    """Make MindFormers' Trainer call load(network, optimizer) instead of loading a state itself.

    The Trainer calls it before it compiles the network.
    """
    from mindformers.trainer import base_trainer

    def load_instead(config: Any, model: Any, network: nn.Cell,  # noqa: ARG001  the Trainer's call
                     dataset: Any, optimizer: Any = None) -> None:  # noqa: ARG001
        load(network, optimizer)

    base_trainer.transform_and_load_checkpoint = load_instead


def resume_after(steps: int) -> None:
    """Make MindFormers' Trainer resume after this many optimizer steps, with or without sink mode.

    MindFormers takes the epoch from the saved state. That epoch counts steps in sink mode and
    passes over the data otherwise.
    """
    from mindformers.trainer import base_trainer

    def load_context(config: Any, dataset: Any) -> None:
        runner = config.runner_config
        per_epoch = runner.sink_size if runner.sink_mode else dataset.get_dataset_size()
        runner.initial_step = steps
        runner.initial_epoch = steps // per_epoch

    base_trainer.load_resume_context_from_checkpoint = load_context
