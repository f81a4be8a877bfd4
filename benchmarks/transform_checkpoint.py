"""How long does transforming sharded checkpoints take beside `cp` of the bytes, and how much memory?

A synthetic GLM-4 of 2.1 GB in float32 with the layers and the vocabulary of the 9B one, in the shards of 4
cards (2 x 2 with optimizer sharding). Each transformation is a process of its own, verification included;
MindSpore's transform_checkpoints, which verifies nothing, is there to compare. Each is timed in turn with
a copy of its input, and the best of two counts.

  python benchmarks/transform_checkpoint.py --folder /tmp       needs 9 GB there, for about three minutes
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

from mindrlhf.checkpoints import containers, layouts, reshard  # noqa: E402
from mindrlhf.checkpoints.tensors import PIECE, count_bytes  # noqa: E402
from mindrlhf.models.glm4 import model_config, weight_names  # noqa: E402

# 2 * 151552 * 768 + 40 * (768 * 1024 + 768 * 768 + 3 * 768 * 2568) = 5.25e8 parameters, 2.1e9 bytes
NUMBERS = model_config.ModelConfig(
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
SHAPES = weight_names.parameter_shapes(NUMBERS)
REPEATS = 2
CHILD = """
import os, sys, time
root, job, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import mindspore as ms
import transform_checkpoint
from mindrlhf import checkpoint, layouts
start = time.perf_counter()
if job == "transform":
    sys.stdout = sys.stderr
    transform_checkpoint.main(arguments)
    sys.stdout = sys.__stdout__
elif job == "mindspore":
    ms.transform_checkpoints(arguments[0], arguments[1], "x", arguments[2])
elif job == "part":
    plan = layouts.read(arguments[1])
    for tensor in load.open_weights(arguments[0], *arguments[2:]).values():
        layout = plan[tensor.name]
        tensor.block(layout.block(layout.index(0), tensor.shape))
status = open("/proc/self/status").read()
print(time.perf_counter() - start, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def write_strategy(path, plan):
    """The strategy of a real run of two layers, with 38 layers more like the second."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    content = ParallelStrategyMap()
    content.ParseFromString((ROOT / "tests/golden/strategies" / f"{plan}.ckpt").read_bytes())
    for item in list(content.parallel_layout_item):
        for layer in range(2, NUMBERS.num_layers) if ".layers.1." in item.param_name else ():
            more = content.parallel_layout_item.add()
            more.CopyFrom(item)
            more.param_name = item.param_name.replace(".layers.1.", f".layers.{layer}.")
    path.write_bytes(content.SerializeToString())
    return path


def make_shards(folder, strategy):
    """Write the shards; their values are N(0, 0.02), a block of them again and again."""
    block = np.random.default_rng(0).normal(0, 0.02, PIECE).astype(np.float32)

    def pieces(count):
        for first in range(0, count, PIECE):
            yield block[: count - first]

    plan = layouts.read_strategy(strategy)
    for rank in range(4):
        (folder / f"rank_{rank}").mkdir(parents=True)
        items = []
        for name, shape in SHAPES.items():
            # what several cards hold must be the same on them; here it is the same on all
            held = tuple(size // parts for size, parts in zip(shape, plan[name].splits))
            items.append((name, "F32", held, lambda held=held: pieces(int(np.prod(held)))))
        containers.write_tensors(folder / f"rank_{rank}" / "x.ckpt", items, hashed=False)


def main():
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the files go, until the end"
    )
    with tempfile.TemporaryDirectory(dir=parse.parse_args().folder, prefix="transform-") as name:
        folder = Path(name)
        strategy, other = (write_strategy(folder / f"{plan}.ckpt", plan) for plan in ("2x2", "1x4"))
        shards, one, new = folder / "shards", folder / "one.ckpt", folder / "new"
        make_shards(shards, strategy)
        size, largest = (
            how(count_bytes("F32", shape) for shape in SHAPES.values()) for how in (sum, max)
        )
        base = processes.run(CHILD, "nothing")[1]
        print(
            f"{size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
            f"base process {base / 1e6:.0f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
            f"{'':38}{'seconds':>8}{'cp':>7}{'ratio':>7}{'peak - base':>13}{'of size':>9}"
        )

        def row(title, source, target, *arguments):
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

        def transform(source, target, *more):
            return "transform", f"--src_checkpoint={source}", f"--dst_checkpoint={target}", *more

        row("MindSpore alone, shards to one", shards, new, "mindspore", shards, new, strategy)
        processes.remove(new)
        for target in (folder / "one.safetensors", one):
            row(
                f"shards to one {target.suffix}",
                shards,
                target,
                *transform(shards, target, f"--src_strategy={strategy}"),
            )
        processes.remove(folder / "one.safetensors")
        row("one to shards", one, new, *transform(one, new, f"--dst_strategy={other}"))
        row(
            "shards to other shards",
            shards,
            new,
            *transform(shards, new, f"--src_strategy={strategy}", f"--dst_strategy={other}"),
        )
        processes.remove(new)
        row("a card's quarter of one file", one, new, "part", one, other)
        row("a card's quarter of other shards", shards, new, "part", shards, other, strategy)
        print(
            f"MindSpore is given {reshard.GROUP / 1e6:.0f} MB of tensors at once, or one tensor that is "
            "larger"
        )


if __name__ == "__main__":
    main()
