"""How much memory do chunks of logits save in training, and what do they cost in time?

    python benchmarks/logps_memory.py    # GLM-4's vocabulary, 1024 positions; about 5 minutes, 4 GB

Prints a table with one line per chunk size, for the forward and backward pass of the output layer
and the log-probs. Each is measured in new processes. Extra memory is the peak (VmHWM) above that of
the same step with 8 positions, which holds the weight (V x H), its gradient, and MindSpore. Time is
the best step of all rounds. Differences from the plain form (chunk 0: all logits at once, kept for
the backward pass) are relative to its largest element.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from processes import memory, reset_peak, table

BASE_POSITIONS = 8


def parser() -> argparse.ArgumentParser:
    """Options, the same for the table and for the processes that measure one line of it."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--vocab", type=int, default=151552, help="V, ids of the vocabulary (default: %(default)s)"
    )
    parse.add_argument(
        "--hidden",
        type=int,
        default=512,
        help="H, width of the hidden states (default: %(default)s)",
    )
    parse.add_argument(
        "--positions", type=int, default=1024, help="S, positions of the row (default: %(default)s)"
    )
    parse.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[512, 256, 128, 64, 32],
        help="logps_chunk_size to measure, positions (default: 512 256 128 64 32)",
    )
    parse.add_argument(
        "--rounds", type=int, default=2, help="processes per row (default: %(default)s)"
    )
    # internal: measure the first chunk size and write value and gradients to this file
    parse.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parse


def measure(arguments: argparse.Namespace) -> None:
    """Run three steps with one chunk size; print JSON, write value and gradients to a file."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    from mindspore import nn

    from mindrlhf import runtime
    from mindrlhf.logps import SequenceLogps

    runtime.tensors_off_heap()
    ms.set_context(mode=0, device_target="CPU")

    class Loss(nn.Cell):
        """Minus the sum of an answer's log-probs."""

        def __init__(self, layer: nn.Cell):
            super().__init__()
            self.logps = SequenceLogps(layer, arguments.vocab, chunk_size=arguments.chunks[0])

        def construct(
            self, hidden: ms.Tensor, labels: ms.Tensor, answer_ids: ms.Tensor
        ) -> ms.Tensor:
            return -self.logps(hidden, labels, answer_ids, 1).sum()

    random = np.random.default_rng(0)
    shape = (1, arguments.positions)
    layer = nn.Dense(
        arguments.hidden,
        arguments.vocab,
        has_bias=False,
        weight_init=ms.Tensor(
            0.05 * random.standard_normal((arguments.vocab, arguments.hidden), "f4")
        ),
    )
    hidden = ms.Tensor(random.standard_normal((*shape, arguments.hidden), "f4"))
    labels = ms.Tensor(random.integers(0, arguments.vocab, shape).astype("i4"))
    ones = ms.Tensor(np.ones(shape, "i4"))
    step = ms.value_and_grad(Loss(layer), 0, layer.trainable_params())
    reset_peak()  # creating the weight does not count
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        loss, (by_hidden, (by_weight,)) = step(hidden, labels, ones)
        loss.asnumpy()
        seconds.append(time.perf_counter() - begin)
        value, gradients = loss.asnumpy(), (by_hidden.asnumpy(), by_weight[::16].asnumpy())
        del loss, by_hidden, by_weight  # or the next step would hold two gradients of the weight
    print(json.dumps({"seconds": min(seconds[1:]), "peak": memory("VmHWM") / 2**20}))
    np.savez(arguments.measure, loss=value, hidden=gradients[0], weight=gradients[1])


class Measured(NamedTuple):
    """What one process measures: seconds, peak memory in MiB, and value and gradients by name."""

    seconds: float
    peak: float
    arrays: dict[str, np.ndarray]


def run(arguments: argparse.Namespace, chunk: int, positions: int, folder: str) -> Measured:
    """Measure one chunk size in a new process.

    Args:
        arguments: the options.
        chunk: logps_chunk_size.
        positions: of the row.
        folder: for the file of the arrays.
    """
    file = Path(folder) / f"{chunk}_{positions}.npz"
    options = {
        "--measure": file,
        "--chunks": chunk,
        "--positions": positions,
        "--vocab": arguments.vocab,
        "--hidden": arguments.hidden,
    }
    command = [sys.executable, __file__, *(str(each) for item in options.items() for each in item)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Measured(**json.loads(output.strip().splitlines()[-1]), arrays=dict(np.load(file)))


def main() -> None:
    """Print the table."""
    arguments = parser().parse_args()
    if arguments.measure:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = run(arguments, 0, BASE_POSITIONS, folder).peak
        runs = {
            chunk: [run(arguments, chunk, arguments.positions, folder)]
            for chunk in (0, *arguments.chunks)
        }
        for _ in range(1, arguments.rounds):
            for chunk, found in runs.items():
                found.append(run(arguments, chunk, arguments.positions, folder))
    plain_extra = min(each.peak for each in runs[0]) - base
    plain_seconds = min(each.seconds for each in runs[0])
    rows = []
    for chunk, found in runs.items():
        extra = max(each.peak for each in found) - base
        seconds = min(each.seconds for each in found)
        errors = [
            np.abs(found[0].arrays[name] - plain).max() / np.abs(plain).max()
            for name, plain in runs[0][0].arrays.items()
        ]
        rows.append(
            [
                f"{chunk}",
                f"{extra:.0f}",
                f"{extra / plain_extra:.2f}",
                f"{seconds:.2f}",
                f"{seconds / plain_seconds:.2f}",
                *(f"{error:.1e}" for error in errors),
            ]
        )
    sizes = f"S {arguments.positions}, V {arguments.vocab}, H {arguments.hidden}"
    table(
        f"{sizes}, float32; base {base:.0f} MiB",
        ["chunk", "extra MiB", "of plain", "seconds", "of plain"]
        + ["value off", "d hidden off", "d weight off"],
        rows,
    )


if __name__ == "__main__":
    main()
