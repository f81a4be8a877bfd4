"""What chunks of logits cost and save: peak memory and time of the output layer's forward and backward pass.

    python benchmarks/logps_memory.py                     # GLM-4's vocabulary, 1024 positions; about 5 minutes, 4 GB

Every row is measured in processes of their own. Extra memory is the peak (VmHWM) above that of the same step with 8
positions, which holds the weight (V x H), its gradient, and MindSpore. Time is the best step of all rounds. Differences
from the plain form (chunk 0: all logits at once, kept for the backward pass) are relative to its largest element.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import mindrlhf.logps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BASE_POSITIONS = 8


def parser():
    """Options, the same for the table and for the processes that measure one row of it."""
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
    parse.add_argument(
        "--measure", type=Path, help=argparse.SUPPRESS
    )  # a file: measure the first chunk into it
    return parse


def measure(arguments):
    """One process: three steps with one chunk size; JSON on stdout, value and gradients into a file."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    from mindspore import nn

    from mindrlhf import runtime

    runtime.tensors_off_heap()
    ms.set_context(mode=0, device_target="CPU")

    class Loss(nn.Cell):
        """Minus the sum of an answer's log-probs."""

        def __init__(self, layer):
            super().__init__()
            self.logps = mindrlhf.logps.SequenceLogps(
                layer, arguments.vocab, chunk_size=arguments.chunks[0]
            )

        def construct(self, hidden, labels, mask, segments):
            return -self.logps(hidden, labels, mask, segments, 1)[0].sum()

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
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # VmHWM starts anew: making the weight is no part of a step
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        loss, (by_hidden, (by_weight,)) = step(hidden, labels, ones, ones)
        loss.asnumpy()
        seconds.append(time.perf_counter() - begin)
        value, gradients = loss.asnumpy(), (by_hidden.asnumpy(), by_weight[::16].asnumpy())
        del loss, by_hidden, by_weight  # or the next step would hold two gradients of the weight
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"seconds": min(seconds[1:]), "peak": peak}))
    np.savez(arguments.measure, loss=value, hidden=gradients[0], weight=gradients[1])


def run(arguments, chunk, positions, folder):
    """Measure one row in a new process: (dict of seconds and peak MiB, dict of arrays)."""
    file = Path(folder) / f"{chunk}_{positions}.npz"
    command = [
        sys.executable,
        __file__,
        "--measure",
        file,
        "--chunks",
        chunk,
        "--positions",
        positions,
        "--vocab",
        arguments.vocab,
        "--hidden",
        arguments.hidden,
    ]
    output = subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.strip().splitlines()[-1]), dict(np.load(file))


def main():
    """Print the table."""
    arguments = parser().parse_args()
    if arguments.measure:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = run(arguments, 0, BASE_POSITIONS, folder)[0]["peak"]
        rows = {
            chunk: [run(arguments, chunk, arguments.positions, folder)]
            for chunk in (0, *arguments.chunks)
        }
        for _ in range(1, arguments.rounds):
            for chunk, found in rows.items():
                found.append(run(arguments, chunk, arguments.positions, folder))
    print(
        f"S {arguments.positions}, V {arguments.vocab}, H {arguments.hidden}, float32; base {base:.0f} MiB"
    )
    print(
        f"{'chunk':>6}{'extra MiB':>11}{'of plain':>10}{'seconds':>10}{'of plain':>10}"
        f"{'value off':>12}{'d hidden off':>14}{'d weight off':>14}"
    )
    plain_extra = min(figures["peak"] for figures, _ in rows[0]) - base
    plain_seconds = min(figures["seconds"] for figures, _ in rows[0])
    for chunk, found in rows.items():
        extra = max(figures["peak"] for figures, _ in found) - base
        seconds = min(figures["seconds"] for figures, _ in found)
        off = [
            np.abs(found[0][1][name] - plain).max() / np.abs(plain).max()
            for name, plain in rows[0][0][1].items()
        ]
        print(
            f"{chunk:>6}{extra:>11.0f}{extra / plain_extra:>10.2f}{seconds:>10.2f}{seconds / plain_seconds:>10.2f}"
            f"{off[0]:>12.1e}{off[1]:>14.1e}{off[2]:>14.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
