"""How do time and memory of one training step on the CPU compare with plain PyTorch?

    python -m venv scratch && scratch/bin/pip install torch==2.13.0 numpy
    python benchmarks/train_step.py --torch_python scratch/bin/python    # about 2 minutes, 4 GB

Prints a table with one line per side and their ratios to PyTorch, then where our time goes. Without
--torch_python or TORCH_PYTHON only our sides run. The model has 8 layers of width 512, 8 heads in 2
groups, ffn 1536 and 8192 ids; 2 pairs, each of a prompt and two answers, are 4 sequences of 256
positions; float32, 2 threads; learning rate, clipping and loss as in finetune_glm4_tiny.yaml.
"shared" is what run_dpo.py computes: 2 rows of 416 positions, each prompt once. "alone" are 2 rows
of 512 positions, where each sequence has its own prompt, so both have PyTorch's positions. All
sides start from the same weights, must get the same losses, and take turns. Times are those of the
best step. Memory is the peak of the process (VmHWM); "above" is what the imports do not take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from processes import ROOT, cpu_model, memory

# PyTorch's side imports this file: no MindSpore up here
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.models.glm4.weight_names import parameter_shapes
from mindrlhf.records import COLUMNS

THREADS, ROWS, LENGTH, PROMPT = 2, 2, 256, 101  # LENGTH positions predict the answer's tokens
ANSWER = LENGTH + 1 - PROMPT
LAYOUTS = {"shared": 416, "alone": 2 * LENGTH}  # positions of our rows
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


def sizes() -> ModelConfig:
    """The model's sizes as mindrlhf takes them."""
    return ModelConfig(
        **SIZES, layernorm_epsilon=EPS, rope_ratio=ROPE_RATIO, eos_token_id=(1,), pad_token_id=0
    )


def make_weights() -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every weight, in MindFormers' names."""
    random = np.random.default_rng(0)
    for name, shape in parameter_shapes(sizes()).items():
        plain = 1.0 if "norm" in name else 0.0 if name.endswith("bias") else None
        yield (
            name,
            np.full(shape, plain, "f4")
            if plain is not None
            else 0.02 * random.standard_normal(shape, "f4"),
        )


def make_pairs() -> list[list[np.ndarray]]:
    """Token ids of prompt, chosen and rejected answer of each pair, int32."""
    random = np.random.default_rng(1)
    return [
        [random.integers(0, SIZES["padded_vocab_size"], count).astype("i4") for count in counts]
        for counts in [(PROMPT, ANSWER, ANSWER)] * ROWS
    ]


def peak() -> float:
    """Peak memory of this process, MiB."""
    return memory("VmHWM") / 2**20


def serve(steps: dict[str, Callable[[], float]], base: float) -> None:
    """Answer each line "NAME COUNT" on stdin: times (s) and losses of COUNT steps, and the peak.

    Args:
        steps: name -> function that runs the step once and returns its loss.
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
            json.dumps({"times": times, "losses": losses, "peak": peak(), "base": base}), flush=True
        )


def build_step(chunk: int, seq_len: int) -> Any:
    """The step that run_dpo.py trains with, and its network and optimizer; weights of make_weights.

    Args:
        chunk: logps_chunk_size.
        seq_len: positions of a row.
    """
    import mindspore as ms
    from mindformers.core.lr import build_lr
    from mindformers.core.optim import build_optim
    from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters
    from mindformers.wrapper import build_wrapper

    from mindrlhf import config, runtime
    from mindrlhf.models.glm4 import build
    from mindrlhf.training import train_step  # noqa: F401  registers the step

    settings = config.load_settings(
        ROOT / "examples/glm4_dpo/finetune_glm4_tiny.yaml",
        run_mode="finetune",
        overrides={
            **{f"model.model_config.{name}": value for name, value in SIZES.items()},
            "model.model_config.seq_length": seq_len,
            "dpo.logps_chunk_size": chunk,
            "dpo.sft_weight": SFT_WEIGHT,
        },
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
    arguments = {"network": network, "optimizer": optimizer, "parallel_config": run.parallel_config}
    return build_wrapper(run.runner_wrapper, default_args=arguments).set_train()


def build_products(matrices: Any) -> Any:
    """A cell that computes only the matrix products with weights, forward and backward.

    Args:
        matrices: ParameterTuple.
    """
    import mindspore as ms
    from mindspore import nn, ops

    class Products(nn.Cell):
        """The sum of one element of each product."""

        def __init__(self) -> None:
            super().__init__()
            self.matmul, self.left = ops.MatMul(), ops.MatMul(transpose_a=True)
            self.right = ops.MatMul(transpose_b=True)
            self.matrices = matrices

        def construct(self, wide: ms.Tensor) -> ms.Tensor:
            """wide (positions, 2 * ffn): its first columns are each product's input."""
            total = wide[0, 0]
            for matrix in self.matrices:
                x = ops.depend(wide, total)[:, : matrix.shape[1]]
                y = self.right(x, matrix)
                total = total + self.matmul(y, matrix)[0, 0] + self.left(y, x)[0, 0]
            return total

    return Products()


def make_columns(layout: str) -> list[np.ndarray]:
    """The columns of a batch, a row for each pair. layout: of LAYOUTS."""
    from mindrlhf.data import mindrecord
    from mindrlhf.data.features import ComparedPair, TokenGroup

    rows = []
    for number, (prompt, *answers) in enumerate(make_pairs()):
        texts = [answer.tolist() for answer in answers]
        if layout == "shared":
            pairs = [ComparedPair(0, 1, number)]
            groups = [TokenGroup(prompt.tolist(), texts, pairs, [REFERENCE] * 2)]
        else:
            groups = [TokenGroup(prompt.tolist(), [text], [], [REFERENCE]) for text in texts]
        row = mindrecord.make_row(groups, pad_id=0, seq_len=LAYOUTS[layout], answers=2, pairs=1)
        rows.append(row | {"chosen": [0], "rejected": [1], "pair_ids": [number]})
    return [np.array([row[name] for row in rows], column.dtype) for name, column in COLUMNS.items()]


def run_ours(layout: str, chunk: int) -> None:
    """Our side of the comparison.

    Args:
        layout: of LAYOUTS.
        chunk: logps_chunk_size.
    """
    import mindspore as ms

    from mindrlhf.training import train_step  # noqa: F401  belongs to the imports

    base = peak()
    step = build_step(chunk, LAYOUTS[layout])
    network = step.network
    columns = [ms.Tensor(column) for column in make_columns(layout)]
    inputs = tuple(columns), ms.Tensor(np.array([[1 / ROWS, 1 / (ROWS * ANSWER)]], "f4"))
    matrices = [parameter for parameter in network.trainable_params() if len(parameter.shape) == 2]
    products = build_products(ms.ParameterTuple(matrices[1:]))  # without the embedding
    wide = ms.Tensor(np.ones((ROWS * LAYOUTS[layout], 2 * SIZES["ffn_hidden_size"]), "f4"))
    gradients = ms.value_and_grad(network, None, step.weights, has_aux=True)
    serve(
        {
            "step": lambda: float(step(*columns)[0]),
            "forward": lambda: float(network(*inputs)[0]),
            "gradients": lambda: float(gradients(*inputs)[0][0]),
            "products": lambda: float(products(wide)),
        },
        base,
    )


def ask(process: subprocess.Popen, name: str, count: int) -> dict[str, Any]:
    """Let a side run a step `count` times; return what serve() prints."""
    process.stdin.write(f"{name} {count}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args[0]} ended; see its error above")


def start(torch_python: str | None, chunk: int) -> dict[str, subprocess.Popen]:
    """Start the sides; each waits for what ask() sends.

    Args:
        torch_python: path of a Python with torch; None: our side only.
        chunk: logps_chunk_size of our side.
    """
    commands = {
        layout: [sys.executable, __file__, "--side", layout, "--chunk", str(chunk)]
        for layout in LAYOUTS
    }
    if torch_python:
        script = Path(__file__).with_name("train_step_torch.py")
        commands["PyTorch"] = [torch_python, str(script)]
    else:
        print("no --torch_python and no TORCH_PYTHON: our side only")
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    return {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name, command in commands.items()
    }


class Figures(NamedTuple):
    """Results of one side: seconds of the best step, MiB at the peak and after the imports."""

    seconds: float
    peak: float
    base: float

    @property
    def above(self) -> float:
        """MiB that the run needs beyond the imports."""
        return self.peak - self.base


def compare(sides: dict[str, subprocess.Popen], rounds: int) -> dict[str, Figures]:
    """Run the sides in turns, and print and return the table."""
    first = {name: ask(process, "step", 3) for name, process in sides.items()}
    answers = {name: [] for name in sides}
    for _ in range(rounds):
        for name, process in sides.items():
            answers[name].append(ask(process, "step", 3))
    figures = {
        name: Figures(
            min(min(answer["times"]) for answer in found), found[-1]["peak"], found[-1]["base"]
        )
        for name, found in answers.items()
    }
    print(
        f"{'':10}{'seconds':>9}{'peak MiB':>10}{'imports':>9}{'above':>7}"
        "   losses of the first steps"
    )
    for name, side in figures.items():
        losses = "  ".join(f"{loss:.5f}" for loss in first[name]["losses"])
        print(
            f"{name:10}{side.seconds:>9.3f}{side.peak:>10.0f}{side.base:>9.0f}{side.above:>7.0f}"
            f"   {losses}"
        )
    if "PyTorch" in figures:
        theirs = figures.pop("PyTorch")
        for name, ours in figures.items():
            print(
                f"{name + ' / PyTorch':19}{ours.seconds / theirs.seconds:.2f}"
                f"{ours.peak / theirs.peak:>10.2f}{'':9}{ours.above / theirs.above:>7.2f}"
            )
    return figures


def print_parts(name: str, ours: subprocess.Popen, seconds: float, rounds: int) -> None:
    """Print where the time of our step goes.

    Args:
        name: of the layout.
        ours: its process.
        seconds: of the complete step.
        rounds: turns of 3 steps.
    """
    forward, gradients, products = (
        min(min(ask(ours, part, 3)["times"][1:]) for _ in range(rounds))
        for part in ("forward", "gradients", "products")
    )
    print(
        f"{name}: forward {forward:.3f} s, backward {gradients - forward:.3f}, clipping and AdamW "
        f"{seconds - gradients:.3f}; matrix products with weights alone {products:.3f}, "
        f"{products / seconds:.0%} of a step"
    )


def main() -> None:
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
    parse.add_argument("--side", choices=LAYOUTS, help=argparse.SUPPRESS)
    arguments = parse.parse_args()
    if arguments.side:
        run_ours(arguments.side, arguments.chunk)
        return
    sides = start(arguments.torch_python, arguments.chunk)
    print(cpu_model())
    for name, figures in compare(sides, arguments.rounds).items():
        print_parts(name, sides[name], figures.seconds, arguments.rounds)
    for process in sides.values():
        process.communicate()


if __name__ == "__main__":
    main()
