"""How long does converting weights take beside `cp` of the same bytes, and how much memory does it need?

A synthetic GLM-4 of 3.1 GB in bfloat16, in shards of at most 1 GiB, is converted each way by a process of its
own. Each is timed in turn with a copy of its input, and the best of three counts: memory that a virtual
machine has yet to get from its host makes the first writing of a file several times slower.

  python benchmarks/convert_weight.py --folder /tmp       needs 6.5 GB there, for about two minutes
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import processes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindrlhf.checkpoints.tensors import PIECE, count_bytes, round_to  # noqa: E402
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names  # noqa: E402

# 2 * 151552 * 2048 + 18 * (2048 * 2560 + 2048 * 2048 + 3 * 2048 * 6848) = 1.55e9 parameters, 3.1e9 bytes
NUMBERS = model_config.ModelConfig(
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
REPEATS = 3
CHILD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import convert_weight
from mindrlhf import checkpoint
start = time.perf_counter()
if sys.argv[1] == "fingerprint":
    checkpoint.fingerprint(checkpoint.read(sys.argv[2]))
elif sys.argv[1] != "nothing":
    sys.stdout = sys.stderr
    convert_weight.main(["--model", "glm-n", *sys.argv[1:]])
    sys.stdout = sys.__stdout__
status = open("/proc/self/status").read()
print(time.perf_counter() - start, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def make_input(folder):
    """Write the model; its values are N(0, 0.02), a block of them again and again."""
    block = round_to(np.random.default_rng(0).normal(0, 0.02, PIECE).astype(np.float32), "BF16")

    def pieces(count):
        for first in range(0, count, PIECE):
            yield block[: count - first]

    hf.write_hf_folder(
        folder,
        NUMBERS,
        "glm",
        "BF16",
        [
            (name, "BF16", shape, lambda shape=shape: pieces(int(np.prod(shape))))
            for name, shape in weight_names.hf_shapes(NUMBERS, "glm").items()
        ],
    )


def remove_output(path):
    """Delete an output and its sidecar."""
    for each in (path, sidecar.path_beside(path)):
        processes.remove(each)


def main():
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the files go, until the end"
    )
    with tempfile.TemporaryDirectory(dir=parse.parse_args().folder, prefix="convert-") as name:
        folder = Path(name)
        source, whole = folder / "hf", folder / "whole.ckpt"
        hf.SHARD = 1 << 30
        make_input(source)
        size = sum(
            count_bytes("BF16", shape) for shape in weight_names.parameter_shapes(NUMBERS).values()
        )
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        base = processes.run(CHILD, "nothing")[1]
        print(
            f"{size / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, base process {base / 1e6:.0f} MB, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
            f"{'':34}{'seconds':>8}{'cp':>7}{'ratio':>7}{'peak - base':>13}{'limit':>10}"
        )

        def row(title, source, target, *options, limit):
            copies, runs = [], []
            for _ in range(REPEATS):
                remove_output(target)
                os.sync()
                copies.append(processes.copy(source, folder / "copy"))
                runs.append(
                    processes.run(CHILD, "--input_path", source, "--output_path", target, *options)
                )
            copied, (seconds, peak) = min(copies), min(runs)
            print(
                f"{title:34}{seconds:8.2f}{copied:7.2f}{seconds / copied:7.2f}"
                f"{(peak - base) / 1e6:10.0f} MB"
                f"{limit / 1e6:7.0f} MB",
                flush=True,
            )

        for dtype in ("bf16", "fp16"):
            for target, limit in ((folder / "out.safetensors", 2 * largest), (whole, 1.15 * size)):
                row(f"to {target.suffix}, {dtype}", source, target, "--dtype", dtype, limit=limit)
                if (dtype, target) != ("fp16", whole):
                    remove_output(target)
        remove_output(source)
        for dtype in ("fp16", "bf16"):
            row(
                f"back from fp16, {dtype}",
                whole,
                folder / "back",
                "--reversed",
                "--dtype",
                dtype,
                limit=2 * largest,
            )
        seconds, peak = processes.run(CHILD, "fingerprint", whole)
        print(f"{'fingerprint':34}{seconds:8.2f}{'':14}{(peak - base) / 1e6:10.0f} MB")


if __name__ == "__main__":
    main()
