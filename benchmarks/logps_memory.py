"""How much memory and time do log-probs by chunks save in a training step, at GLM-4's vocabulary?

Forward and backward of the output layer and the log-probs alone, for one sequence of S = 1024, hidden 512, 151,552 ids,
float32: logits of all positions are 1024 x 151,552 x 4 bytes = 0.62 GB a copy. Each setting runs in a process of its own;
`extra` is its peak over that of the same process before the first step, less the weight's gradient, which every form needs.

    python benchmarks/logps_memory.py
"""
import json
import subprocess
import sys
import time
from pathlib import Path

SEQ_LEN, HIDDEN, VOCABULARY = 1024, 512, 151552
CHUNKS = (0, 512, 256, 128, 64)
REPEATS = 4


def peak():
    """Most resident memory of this process so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def measure(chunk):
    """One setting: extra bytes, seconds of the fastest step, loss."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    from mindrlhf import backend  # noqa: F401  quiets MindSpore
    from mindrlhf.losses import SequenceLogps
    ms.set_context(mode=0, device_target="CPU")
    random = np.random.default_rng(0)
    output_layer = nn.Dense(HIDDEN, VOCABULARY, has_bias=False)
    output_layer.weight.set_data(ms.Tensor(random.normal(0, 0.02, (VOCABULARY, HIDDEN)).astype("f4")))

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.logps = SequenceLogps(output_layer, VOCABULARY, chunk_size=chunk)

        def construct(self, hidden, labels, mask, segments):
            return -self.logps(hidden, labels, mask, segments, 1)[0].sum()

    class Step(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.loss, self.weights = Loss(), ms.ParameterTuple(output_layer.trainable_params())

        def construct(self, *inputs):
            return ops.value_and_grad(self.loss, 0, self.weights)(*inputs)

    inputs = [ms.Tensor(random.normal(size=(1, SEQ_LEN, HIDDEN)).astype("f4")),
              ms.Tensor(random.integers(0, VOCABULARY, (1, SEQ_LEN)).astype("i4")),
              ms.Tensor(np.ones((1, SEQ_LEN), "i4")), ms.Tensor(np.ones((1, SEQ_LEN), "i4"))]
    step, before, times = Step(), peak(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        loss, gradients = step(*inputs)
        value = float(loss.asnumpy())
        times.append(time.perf_counter() - started)
        del loss, gradients
    return {"extra": peak() - before - VOCABULARY * HIDDEN * 4, "seconds": min(times[1:]), "loss": value}


def main():
    results = {}
    for chunk in CHUNKS:
        output = subprocess.run([sys.executable, __file__, str(chunk)], capture_output=True, text=True, check=True)
        results[chunk] = json.loads(output.stdout.strip().splitlines()[-1])
    plain = results[0]
    print(f"{'chunk':>6}{'extra memory':>15}{'of plain':>10}{'step':>10}{'of plain':>10}{'loss':>14}")
    for chunk, result in results.items():
        print(f"{chunk or 'plain':>6}{result['extra'] / 1e9:>12.2f} GB{result['extra'] / plain['extra']:>10.2f}"
              f"{result['seconds']:>8.2f} s{result['seconds'] / plain['seconds']:>10.2f}{result['loss']:>14.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
