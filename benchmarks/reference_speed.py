"""How many real tokens a second does the reference pass score, packed and with one pair a row?

    python benchmarks/reference_speed.py

Prints a table with two lines per row length S. The model is the tiny GLM-4 with random weights on
this machine; rows have the same length in both cases. A row costs the same however many pairs share
it, so the ratio follows from the number of pairs in a row. Pairs are synthetic, see data_model.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import data_model
import numpy as np
from processes import ROOT, table

from mindrlhf import config, runtime
from mindrlhf.data.features import TokenPair
from mindrlhf.data.reference import Scorer
from mindrlhf.models.glm4 import build

BATCH, ROWS, REPEATS = 2, 48, 5


def load_model(seq_len: int) -> Any:
    """The tiny GLM-4 for rows of seq_len."""
    settings = config.load_settings(
        ROOT / "examples/glm4_dpo/process_glm4_tiny.yaml",
        run_mode="preprocess",
        overrides={"model.model_config.seq_length": seq_len},
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    return build.build_network(run)


def measure(scorer: Scorer, pairs: Sequence[TokenPair]) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    scorer.score_pairs(pairs)
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    lines = []
    for seq_len in (512, 1024):
        model, random = load_model(seq_len), np.random.default_rng(0)
        counts = np.minimum(data_model.parts(ROWS * seq_len // 290), seq_len // 3)
        pairs = [
            TokenPair(*(random.integers(0, 498, count).tolist() for count in triple))
            for triple in counts
        ]
        jobs = [
            (
                Scorer(model, seq_len=seq_len, batch_size=BATCH, pad_id=0, packed=packed),
                pairs if packed else pairs[:ROWS],
            )
            for packed in (True, False)
        ]
        for scorer, some in jobs:
            scorer.score_pairs(some[:BATCH])  # compiles
        times = np.median([[measure(*job) for job in jobs] for _ in range(REPEATS)], 0)  # in turns
        speeds = [
            (sum(pair.size for pair in some) / seconds, len(some) / seconds)
            for (_, some), seconds in zip(jobs, times)
        ]
        for name, (tokens, each) in zip(("packed", "one pair a row"), speeds):
            lines.append(
                [
                    f"{seq_len}",
                    name,
                    f"{tokens:,.0f}",
                    f"{each:,.1f}",
                    f"{tokens / speeds[1][0]:.1f} x",
                ]
            )
    table("reference pass, tiny GLM-4", ["S", "rows", "real tokens/s", "pairs/s", "ratio"], lines)


if __name__ == "__main__":
    main()
