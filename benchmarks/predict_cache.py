"""How much faster does the tiny GLM-4 predict with a KV cache than without, on a CPU?

    python benchmarks/predict_cache.py

Prints a table with one line per answer length. "first" includes compilation, as each run of the
predict command does; "again" does not. Ratios are of the latter; above 1 the cache is faster. The
weights are random, the prompt has 20 tokens, decoding is greedy, and no token stops it, so every
answer has its full length.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from processes import ROOT, cpu_model, table

from mindrlhf import config, runtime
from mindrlhf.models.glm4 import build, load

LENGTHS = (16, 64, 128, 192)
PROMPT = list(range(20, 40))
CACHE = {"use_past": True, "use_flash_attention": True, "block_size": 16, "num_blocks": 64}
FORMS = {
    "without": {"use_past": False, "is_dynamic": False, "use_flash_attention": False},
    "static": {**CACHE, "is_dynamic": False},
    "dynamic": {**CACHE, "is_dynamic": True},
}
HEAD = [
    "new tokens",
    "first, s: without",
    "static",
    "dynamic",
    "again: without",
    "static",
    "dynamic",
    "ratio: static",
    "dynamic",
]


def build_model(form: dict[str, Any]) -> Any:
    """The network of predict_glm4_tiny.yaml with new attention settings and fixed weights."""
    settings = config.load_settings(
        ROOT / "examples/glm4_dpo/predict_glm4_tiny.yaml",
        run_mode="predict",
        overrides={f"model.model_config.{key}": value for key, value in form.items()},
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    network, random = build.build_network(run), np.random.default_rng(0)
    load.set_values(
        network,
        {
            parameter.name: lambda shape=parameter.shape: random.normal(0, 0.1, shape).astype(
                np.float32
            )
            for parameter in network.get_parameters()
            if len(parameter.shape) == 2
        },
    )
    return network.set_train(False)


def answer(network: Any, length: int) -> tuple[float, list[int]]:
    """(seconds, tokens) of an answer of so many tokens."""
    start = time.perf_counter()
    output = network.generate(
        [PROMPT], max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=[-1]
    )[0]
    return time.perf_counter() - start, output.tolist()


def main() -> None:
    """Print the table."""
    lines = []
    for length in LENGTHS:
        networks = {name: build_model(form) for name, form in FORMS.items()}
        first = {name: answer(network, length) for name, network in networks.items()}
        assert all(text == first["without"][1] for _, text in first.values()), (
            "the cache changes the answer"
        )
        again = {name: answer(network, length)[0] for name, network in networks.items()}
        lines.append(
            [
                f"{length}",
                *(f"{seconds:.2f}" for seconds, _ in first.values()),
                *(f"{seconds:.2f}" for seconds in again.values()),
                *(f"{again['without'] / again[name]:.2f}" for name in ("static", "dynamic")),
            ]
        )
    table(
        "prediction of the tiny GLM-4 without a cache, and with one of static or dynamic shapes; "
        + cpu_model(),
        HEAD,
        lines,
    )


if __name__ == "__main__":
    main()
