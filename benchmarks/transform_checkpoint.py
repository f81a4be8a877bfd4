"""How long does transforming sharded checkpoints take compared with `cp`, and how much memory?

    python benchmarks/transform_checkpoint.py --folder /tmp    # needs 9 GB there; about 3 minutes

Prints a table with one line per transformation: seconds, seconds of `cp` of the input, their ratio,
and peak memory. The input is a synthetic GLM-4 of 2.1 GB in float32 with the layers and the
vocabulary of the 9B model, in the shards of 4 cards (2 x 2 with optimizer sharding). Each
transformation runs in a process of its own and includes verification; MindSpore's
transform_checkpoints, which verifies nothing, is there for comparison. Each runs in turn with a
copy of its input, and the best of two counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes

from mindrlhf.checkpoints import containers, layouts, reshard
from mindrlhf.checkpoints.tensors import PIECE, TensorItem, count_bytes
from mindrlhf.models.glm4 import model_config, weight_names

# 2 * 151552 * 768 + 40 * (768 * 1024 + 768 * 768 + 3 * 768 * 2568) = 5.25e8 parameters, 2.1e9 bytes
CONFIG = model_config.ModelConfig(
    num_layers=40,
    padded_vocab_size=151552,
    hidden_size=768,
    ffn_hidden_size=2568,
    num_attention_heads=12,
    multi_query_group_num=2,
    kv_channels=64,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=1,
    eos_token_id=(151329,),
    pad_token_id=151329,
)
SHAPES = weight_names.parameter_shapes(CONFIG)
REPEATS = 2
CHILD = """
import sys, time
root, job, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import mindspore as ms
import transform_checkpoint
from mindrlhf.checkpoints import layouts
from mindrlhf.models.glm4 import load
start = time.perf_counter()
if job == "transform":
    sys.stdout = sys.stderr
    transform_checkpoint.main(arguments)
    sys.stdout = sys.__stdout__
elif job == "mindspore":
    ms.transform_checkpoints(arguments[0], arguments[1], "x", arguments[2])
elif job == "part":
    plan = layouts.read_strategy(arguments[1])
    for tensor in load.open_weights(arguments[0], *arguments[2:]).values():
        layout = plan[tensor.name]
        tensor.block(layout.block(layout.index(0), tensor.shape))
status = open("/proc/self/status").read()
print(time.perf_counter() - start, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def write_strategy(path: Path, plan: str) -> Path:
    """Write the strategy of a real run of two layers, with the second layer repeated 38 times."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    content = ParallelStrategyMap()
    content.ParseFromString((processes.ROOT / f"tests/golden/strategies/{plan}.ckpt").read_bytes())
    for item in list(content.parallel_layout_item):
        for layer in range(2, CONFIG.num_layers) if ".layers.1." in item.param_name else ():
            more = content.parallel_layout_item.add()
            more.CopyFrom(item)
            more.param_name = item.param_name.replace(".layers.1.", f".layers.{layer}.")
    path.write_bytes(content.SerializeToString())
    return path


def make_shards(folder: Path, strategy: Path) -> None:
    """Write the shards; their values repeat one block of N(0, 0.02)."""
    block = np.random.default_rng(0).normal(0, 0.02, PIECE).astype(np.float32)

    def pieces(count: int) -> Iterator[np.ndarray]:
        for first in range(0, count, PIECE):
            yield block[: count - first]

    plan = layouts.read_strategy(strategy)
    for rank in range(4):
        (folder / f"rank_{rank}").mkdir(parents=True)
        items = []
        for name, shape in SHAPES.items():
            # replicas must be equal; here all shards of a tensor are
            held = tuple(size // parts for size, parts in zip(shape, plan[name].splits))
            items.append(
                TensorItem(name, "F32", held, lambda held=held: pieces(int(np.prod(held))))
            )
        containers.write_tensors(folder / f"rank_{rank}" / "x.ckpt", items, hashed=False)


def transform(source: Path, target: Path, **strategies: Path) -> list[str]:
    """Arguments of CHILD for transform_checkpoint.py; strategies are src_strategy, dst_strategy."""
    options = {"src_checkpoint": source, "dst_checkpoint": target, **strategies}
    return ["transform", *(f"--{name}={value}" for name, value in options.items())]


def compare(folder: Path) -> None:
    """Print the table; all files go to the folder."""
    strategy, other = (write_strategy(folder / f"{plan}.ckpt", plan) for plan in ("2x2", "1x4"))
    shards, one, new = folder / "shards", folder / "one.ckpt", folder / "new"
    make_shards(shards, strategy)
    sizes = [count_bytes("F32", shape) for shape in SHAPES.values()]
    size, largest = sum(sizes), max(sizes)
    base = processes.run(CHILD, "nothing")[1]
    print(
        f"{size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
        f"base process {base / 1e6:.0f} MB, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        f"{'':38}{'seconds':>8}{'cp':>7}{'ratio':>7}{'peak - base':>13}{'of size':>9}"
    )

    def measure(title: str, source: Path, target: Path, *arguments: object) -> None:
        """Print one line; the arguments are those of CHILD. The last target is left there."""
        copies, runs = [], []
        for _ in range(REPEATS):
            processes.remove(target)
            os.sync()
            copies.append(processes.copy(source, folder / "copy"))
            runs.append(processes.run(CHILD, *arguments))
        copied, (seconds, peak) = min(copies), min(runs)
        print(
            f"{title:38}{seconds:8.2f}{copied:7.2f}{seconds / copied:7.2f}"
            f"{(peak - base) / 1e6:10.0f} MB{(peak - base) / size:9.2f}",
            flush=True,
        )

    title = "MindSpore alone, shards to one"
    measure(title, shards, new, "mindspore", shards, new, strategy)
    processes.remove(new)
    for target in (folder / "one.safetensors", one):
        arguments = transform(shards, target, src_strategy=strategy)
        measure(f"shards to one {target.suffix}", shards, target, *arguments)
    processes.remove(folder / "one.safetensors")
    measure("one to shards", one, new, *transform(one, new, dst_strategy=other))
    arguments = transform(shards, new, src_strategy=strategy, dst_strategy=other)
    measure("shards to other shards", shards, new, *arguments)
    processes.remove(new)
    measure("a card's quarter of one file", one, new, "part", one, other)
    measure("a card's quarter of other shards", shards, new, "part", shards, other, strategy)
    print(f"MindSpore gets {reshard.GROUP / 1e6:.0f} MB of tensors at once, or one larger tensor")


if __name__ == "__main__":
    processes.in_folder(__doc__, compare)
