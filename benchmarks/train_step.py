"""One training step against the same step in plain PyTorch: time, peak memory, and where the time goes.

    python -m venv scratch && scratch/bin/pip install torch==2.13.0 numpy
    python benchmarks/train_step.py --torch_python scratch/bin/python      # or TORCH_PYTHON=...; about 2 minutes, 4 GB

Without that Python only our side runs. The model has 8 layers of width 512, 8 heads in 2 groups, ffn 1536 and 8192 ids;
2 rows of pairs are 4 sequences of 256 positions; float32, 2 threads, learning rate, clipping and loss as in
finetune_glm4_tiny.yaml. Both sides start from the same weights, must find the same losses, and take turns; times are
the best step. Memory is the peak of the process (VmHWM), of it "above imports" what the run itself needs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mindrlhf.models.glm4 import build, model_config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
THREADS, ROWS, LENGTH, PROMPT = 2, 2, 256, 100
SIZES = {
    "num_layers": 8,
    "padded_vocab_size": 8192,
    "hidden_size": 512,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 8,
    "multi_query_group_num": 2,
    "kv_channels": 64,
}
EPS, ROPE_RATIO, BETA, SFT_WEIGHT, RATE, MAX_NORM = 1.5625e-07, 500, 0.1, 1.0, 3e-3, 1.0
REFERENCE = -1400.0  # log-prob of every answer, about what the random weights give it


def numbers():
    """Sizes as weights.shapes takes them."""
    return model_config.ModelConfig(
        **SIZES, layernorm_epsilon=EPS, rope_ratio=ROPE_RATIO, eos_token_id=(1,), pad_token_id=0
    )


def make_weights():
    """Name and value of every weight, MindFormers' names, one after another."""
    from mindrlhf.models.glm4.weight_names import shapes

    random = np.random.default_rng(0)
    for name, shape in shapes(numbers()).items():
        plain = 1.0 if "norm" in name else 0.0 if name.endswith("bias") else None
        yield (
            name,
            np.full(shape, plain, "f4")
            if plain is not None
            else 0.02 * random.standard_normal(shape, "f4"),
        )


def make_batch():
    """For each side ids, labels, mask (rows, 256) and reference log-probs (rows, 1)."""
    random = np.random.default_rng(1)
    mask = np.repeat([[0, 1]], [PROMPT, LENGTH - PROMPT], axis=1).repeat(ROWS, 0).astype("i4")
    for _ in ("chosen", "rejected"):
        ids = random.integers(0, SIZES["padded_vocab_size"], (ROWS, LENGTH + 1)).astype("i4")
        yield ids[:, :-1], ids[:, 1:], mask, np.full((ROWS, 1), REFERENCE, "f4")


def memory():
    """Peak of this process, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def serve(steps, base):
    """Answer each line "NAME COUNT" on stdin with times (s) and losses of so many steps, and the peak so far.

    Args:
        steps: dict, name -> function that runs it once and returns its loss.
        base: peak after the imports, MiB.
    """
    for line in sys.stdin:
        name, count = line.split()
        times, losses = [], []
        for _ in range(int(count)):
            begin = time.perf_counter()
            losses.append(steps[name]())
            times.append(time.perf_counter() - begin)
        print(
            json.dumps({"times": times, "losses": losses, "peak": memory(), "base": base}),
            flush=True,
        )


def ours(chunk):
    """Our side: the network, optimizer and step that run_dpo.py trains with."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    from mindformers.core.lr import build_lr
    from mindformers.core.optim import build_optim
    from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters
    from mindformers.wrapper import build_wrapper
    from mindspore import nn, ops

    from mindrlhf import config, runtime
    from mindrlhf.training import train_step  # noqa: F401  registers the step

    base = memory()
    sizes = {**SIZES, "seq_length": LENGTH}
    overrides = {f"model.model_config.{name}": value for name, value in sizes.items()}
    settings = config.load_settings(
        HERE.parent / "examples/glm4_dpo/finetune_glm4_tiny.yaml",
        run_mode="finetune",
        overrides={**overrides, "dpo.logps_chunk_size": chunk, "dpo.sft_weight": SFT_WEIGHT},
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    network = build.build_network(run).set_train()
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    for name, value in make_weights():
        parameters[name].set_data(ms.Tensor(value))
    schedule = build_lr(
        {"type": "ConstantWarmUpLR", "learning_rate": RATE, "warmup_steps": 0, "total_steps": 1000}
    )
    groups = get_optimizer_grouped_parameters(network, 0.0, schedule)
    optimizer = build_optim(
        run.optimizer, default_args={"params": groups, "learning_rate": schedule}
    )
    step = build_wrapper(
        run.runner_wrapper,
        default_args={
            "network": network,
            "optimizer": optimizer,
            "parallel_config": run.parallel_config,
        },
    ).set_train()
    columns = []
    for ids, labels, mask, reference in make_batch():
        columns += [ids, labels, mask, np.ones_like(mask), reference]
    columns = [
        ms.Tensor(column) for column in (*columns, np.arange(ROWS, dtype="i4").reshape((-1, 1)))
    ]
    inputs = tuple(columns), ms.Tensor(np.array([[1 / ROWS, 1 / (ROWS * (LENGTH - PROMPT))]], "f4"))

    class Products(nn.Cell):
        """Only the matrix products with weights, forward and backward."""

        def __init__(self):
            super().__init__()
            self.matmul, self.left = ops.MatMul(), ops.MatMul(transpose_a=True)
            self.right = ops.MatMul(transpose_b=True)
            matrices = [
                parameter for parameter in network.trainable_params() if len(parameter.shape) == 2
            ][1:]
            self.matrices = ms.ParameterTuple(matrices)

        def construct(self, wide):
            """wide (positions, 2 * ffn): its first columns are each product's input."""
            total = wide[0, 0]
            for matrix in self.matrices:
                x = ops.depend(wide, total)[:, : matrix.shape[1]]
                y = self.right(x, matrix)
                total = total + self.matmul(y, matrix)[0, 0] + self.left(y, x)[0, 0]
            return total

    wide = ms.Tensor(np.ones((2 * ROWS * LENGTH, 2 * SIZES["ffn_hidden_size"]), "f4"))
    products, gradients = Products(), ms.value_and_grad(network, None, step.weights, has_aux=True)
    serve(
        {
            "step": lambda: float(step(*columns)[0]),
            "forward": lambda: float(network(*inputs)[0]),
            "gradients": lambda: float(gradients(*inputs)[0][0]),
            "products": lambda: float(products(wide)),
        },
        base,
    )


def ask(process, name, count):
    """Let a side run something; its answer."""
    process.stdin.write(f"{name} {count}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args[0]} ended; its error stands above")


def compare(torch_python, rounds, chunk):
    """Run both sides in turns and print the table."""
    commands = {"ours": [sys.executable, __file__, "--side", "ours", "--chunk", str(chunk)]}
    if torch_python:
        commands["PyTorch"] = [torch_python, str(HERE / "train_step_torch.py")]
    else:
        print("no --torch_python and no TORCH_PYTHON: our side alone")
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    sides = {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name, command in commands.items()
    }
    first = {name: ask(process, "step", 3) for name, process in sides.items()}
    answers = {name: [] for name in sides}
    for _ in range(rounds):
        for name, process in sides.items():
            answers[name].append(ask(process, "step", 3))
    figures = {
        name: (min(min(answer["times"]) for answer in found), found[-1]["peak"], found[-1]["base"])
        for name, found in answers.items()
    }
    print(
        f"{'':10}{'seconds':>9}{'peak MiB':>10}{'imports':>9}{'above':>7}   losses of the first steps"
    )
    for name, (seconds, peak, base) in figures.items():
        losses = "  ".join(f"{loss:.5f}" for loss in first[name]["losses"])
        print(f"{name:10}{seconds:>9.3f}{peak:>10.0f}{base:>9.0f}{peak - base:>7.0f}   {losses}")
    if torch_python:
        (seconds, peak, base), (their_seconds, their_peak, their_base) = (
            figures["ours"],
            figures["PyTorch"],
        )
        print(
            f"{'ratio':10}{seconds / their_seconds:>9.2f}{peak / their_peak:>10.2f}{'':9}"
            f"{(peak - base) / (their_peak - their_base):>7.2f}"
        )
    parts = {
        name: min(min(ask(sides["ours"], name, 3)["times"][1:]) for _ in range(rounds))
        for name in ("forward", "gradients", "products")
    }
    whole = figures["ours"][0]
    print(
        f"ours: forward {parts['forward']:.3f} s, backward {parts['gradients'] - parts['forward']:.3f}, clipping and "
        f"AdamW {whole - parts['gradients']:.3f}; matrix products with weights alone {parts['products']:.3f}, "
        f"{parts['products'] / whole:.0%} of a step"
    )
    for process in sides.values():
        process.communicate()


def main():
    """Read the options."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--torch_python",
        default=os.environ.get("TORCH_PYTHON"),
        help="a Python that has torch and numpy (default: the environment variable TORCH_PYTHON)",
    )
    parse.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="turns of 3 steps for each side (default: %(default)s)",
    )
    parse.add_argument(
        "--chunk", type=int, default=256, help="logps_chunk_size, positions (default: %(default)s)"
    )
    parse.add_argument("--side", choices=["ours"], help=argparse.SUPPRESS)
    arguments = parse.parse_args()
    if arguments.side:
        ours(arguments.chunk)
    else:
        compare(arguments.torch_python, arguments.rounds, arguments.chunk)


if __name__ == "__main__":
    main()
