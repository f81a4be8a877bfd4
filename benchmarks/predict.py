"""How fast does the tiny GLM-4 answer on a CPU: start-up, with and without a cache, in batches?

    python benchmarks/predict.py

Prints a table with one line per form of the network. "start" is the time of a command that
generates one token: a new process with imports, weights and compilation. The other columns are new
tokens per second of the engine behind run_dpo.py and the server, after compilation, at several
batch sizes, and the ratio of the largest to 1. Prompts have 20 to 35 tokens, answers 64; decoding
is greedy. Each rate is the best of three runs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from predict_cache import CACHE, build_model
from processes import ROOT, cpu_model, in_folder, table

from mindrlhf import config
from mindrlhf.inference.engine import Answer, Engine
from mindrlhf.inference.sampling import Sampling
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

EXAMPLE = ROOT / "examples/glm4_dpo"
YAML = EXAMPLE / "predict_glm4_tiny.yaml"
BATCHES, NEW_TOKENS, RUNS = (1, 4, 16), 64, 3
FORMS: dict[str, dict[str, Any]] = {
    "without a cache": {"use_past": False, "use_flash_attention": False},
    "with a cache": {**CACHE, "num_blocks": 256, "is_dynamic": True},
}


def command(script: Path, *arguments: object) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], check=True, capture_output=True
    )
    return time.perf_counter() - start


def start_up(folder: Path, form: dict[str, Any]) -> float:
    """Seconds of the predict command for one token."""
    yaml = folder / "predict.yaml"
    lines = [f"    {key}: {value}" for key, value in form.items()]
    yaml.write_text("\n".join([f"base_config: {YAML}", "model:", "  model_config:", *lines]))
    options = ["--vocab_file", folder / "hf/tokenizer.model", "--predict_data", "Hello"]
    return command(
        EXAMPLE / "run_dpo.py",
        *("--config", yaml, "--load_checkpoint", folder / "tiny.ckpt", "--max_new_tokens", 1),
        *options,
    )


def rate(engine: Engine, batch_size: int) -> float:
    """New tokens per second at a batch size; the first run compiles and does not count."""
    engine.batch_size, rates = batch_size, []
    for _ in range(RUNS + 1):
        answers = [
            Answer([*range(20, 40 + row)], Sampling(NEW_TOKENS)) for row in range(batch_size)
        ]
        start, before = time.perf_counter(), engine.generated
        for _ in engine.run(answers):
            pass
        rates.append((engine.generated - before) / (time.perf_counter() - start))
    return max(rates[1:])


def compare(folder: Path) -> None:
    """Print the table."""
    command(EXAMPLE / "make_tiny_glm4.py", "--output_path", folder)
    command(
        ROOT / "convert_weight.py",
        *("--model", "glm-n", "--input_path", folder / "hf", "--dtype", "fp32"),
        *("--output_path", folder / "tiny.ckpt"),
    )
    tokenizer = Glm4Tokenizer(folder / "hf/tokenizer.model")
    tokenizer.stop_ids = []  # every answer has its full length
    lines = []
    for name, form in FORMS.items():
        seconds = start_up(folder, form)
        settings = config.load_settings(
            YAML,
            run_mode="predict",
            overrides={f"model.model_config.{key}": value for key, value in form.items()},
        )
        engine = Engine(build_model(form), tokenizer, settings)
        rates = [rate(engine, batch_size) for batch_size in BATCHES]
        numbers = [f"{value:.0f}" for value in rates]
        lines.append([name, f"{seconds:.1f}", *numbers, f"{rates[-1] / rates[0]:.1f}"])
    table(
        f"prediction of the tiny GLM-4, new tokens per second; {cpu_model()}",
        ["network", "start, s", *(f"batch {size}" for size in BATCHES), "ratio"],
        lines,
    )


if __name__ == "__main__":
    in_folder(__doc__, compare)
