"""How long does converting weights take compared with `cp`, and how much memory does it need?

    python benchmarks/convert_weight.py --folder /tmp    # needs 6.5 GB there; about 2 minutes

Prints a table with one line per format and dtype: seconds, seconds of `cp` of the input, their
ratio, and peak memory next to its limit. The input is a synthetic GLM-4 of 3.1 GB in bfloat16, in
shards of at most 1 GiB. Each conversion runs in a process of its own, in turn with a copy of its
input, and the best of three counts: the first write of a file is several times slower while a
virtual machine still has to get the memory from its host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes

from mindrlhf.checkpoints.tensors import PIECE, TensorItem, count_bytes, round_to
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names

# 2 * 151552 * 2048 + 18 * (2048 * 2560 + 2048 * 2048 + 3 * 2048 * 6848) = 1.55e9 parameters,
# 3.1e9 bytes
CONFIG = model_config.ModelConfig(
    num_layers=18,
    padded_vocab_size=151552,
    hidden_size=2048,
    ffn_hidden_size=6848,
    num_attention_heads=16,
    multi_query_group_num=2,
    kv_channels=128,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=500,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
)
SHARD = 1 << 30  # bytes
REPEATS = 3
CHILD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import convert_weight
from mindrlhf.checkpoints import containers, fingerprints
start = time.perf_counter()
if sys.argv[1] == "fingerprint":
    fingerprints.fingerprint(containers.open_tensors(sys.argv[2]))
elif sys.argv[1] != "nothing":
    sys.stdout = sys.stderr
    convert_weight.main(["--model", "glm-n", *sys.argv[1:]])
    sys.stdout = sys.__stdout__
status = open("/proc/self/status").read()
print(time.perf_counter() - start, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def make_input(folder: Path) -> None:
    """Write the model; its values repeat one block of N(0, 0.02)."""
    block = round_to(np.random.default_rng(0).normal(0, 0.02, PIECE).astype(np.float32), "BF16")

    def pieces(count: int) -> Iterator[np.ndarray]:
        for first in range(0, count, PIECE):
            yield block[: count - first]

    hf.write_hf_folder(
        folder,
        CONFIG,
        "glm",
        "BF16",
        [
            TensorItem(name, "BF16", shape, lambda shape=shape: pieces(int(np.prod(shape))))
            for name, shape in weight_names.hf_shapes(CONFIG, "glm").items()
        ],
        shard_size=SHARD,
    )


def remove_output(path: Path) -> None:
    """Delete an output and its sidecar."""
    for each in (path, sidecar.path_beside(path)):
        processes.remove(each)


def measure(
    title: str, source: Path, target: Path, *options: str, scratch: Path, base: int, limit: float
) -> None:
    """Print one line of the table.

    Args:
        title: the line's first column.
        source: input of the conversion and of `cp`.
        target: output; the last one is left there.
        options: further options of convert_weight.py.
        scratch: free name for the copy.
        base: peak memory of a process that only imports, bytes.
        limit: memory that the conversion may need above that, bytes.
    """
    copies, runs = [], []
    for _ in range(REPEATS):
        remove_output(target)
        os.sync()
        copies.append(processes.copy(source, scratch))
        runs.append(processes.run(CHILD, "--input_path", source, "--output_path", target, *options))
    copied, (seconds, peak) = min(copies), min(runs)
    print(
        f"{title:34}{seconds:8.2f}{copied:7.2f}{seconds / copied:7.2f}"
        f"{(peak - base) / 1e6:10.0f} MB"
        f"{limit / 1e6:7.0f} MB",
        flush=True,
    )


def compare(folder: Path) -> None:
    """Print the table; all files go to the folder."""
    source, single_file = folder / "hf", folder / "whole.ckpt"
    make_input(source)
    size = sum(
        count_bytes("BF16", shape) for shape in weight_names.parameter_shapes(CONFIG).values()
    )
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    base = processes.run(CHILD, "nothing")[1]
    print(
        f"{size / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, "
        f"base process {base / 1e6:.0f} MB, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        f"{'':34}{'seconds':>8}{'cp':>7}{'ratio':>7}{'peak - base':>13}{'limit':>10}"
    )
    shared = {"scratch": folder / "copy", "base": base}
    for dtype in ("bf16", "fp16"):
        options = ("--dtype", dtype)
        for target, limit in (
            (folder / "out.safetensors", 2 * largest),
            (single_file, 1.15 * size),
        ):
            title = f"to {target.suffix}, {dtype}"
            measure(title, source, target, *options, limit=limit, **shared)
            if (dtype, target) != ("fp16", single_file):
                remove_output(target)
    remove_output(source)
    for dtype in ("fp16", "bf16"):
        title, options = f"back from fp16, {dtype}", ("--reversed", "--dtype", dtype)
        measure(title, single_file, folder / "back", *options, limit=2 * largest, **shared)
    seconds, peak = processes.run(CHILD, "fingerprint", single_file)
    print(f"{'fingerprint':34}{seconds:8.2f}{'':14}{(peak - base) / 1e6:10.0f} MB")


if __name__ == "__main__":
    processes.in_folder(__doc__, compare)
