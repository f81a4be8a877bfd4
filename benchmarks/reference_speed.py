"""How many real tokens a second does the reference pass score, packed and with one pair a row?

The tiny GLM-4 with random weights on this machine, rows of the same length for both. Pairs are made up: see
data_model.py. A row costs the same however many pairs share it, so the ratio is about the pairs in a row.

    python benchmarks/reference_speed.py
"""

import time

import data_model
import numpy as np

from mindrlhf import config
from mindrlhf.data.features import TokenPair
from mindrlhf.data.reference import Scorer
from mindrlhf.models.glm4 import build

BATCH, ROWS, REPEATS = 2, 48, 5


def load_model(seq_len):
    """The tiny GLM-4 for rows of seq_len."""
    from mindrlhf import runtime

    settings = config.load_settings(
        data_model.ROOT / "examples/glm4_dpo/process_glm4_tiny.yaml",
        run_mode="preprocess",
        overrides={"model.model_config.seq_length": seq_len},
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    return build.build_network(run)


def seconds(scorer, pairs):
    """Time of one run."""
    begin = time.perf_counter()
    scorer(pairs)
    return time.perf_counter() - begin


def main():
    lines = []
    for seq_len in (512, 1024):
        model, random = load_model(seq_len), np.random.default_rng(0)
        counts = np.minimum(data_model.parts(ROWS * seq_len // 180), seq_len // 2)
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
            scorer(some[:BATCH])  # compiles
        times = np.median([[seconds(*job) for job in jobs] for _ in range(REPEATS)], 0)  # in turns
        speeds = [
            (
                sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in some)
                / time_,
                len(some) / time_,
            )
            for (_, some), time_ in zip(jobs, times)
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
    data_model.table(
        "reference pass, tiny GLM-4", ["S", "rows", "real tokens/s", "pairs/s", "ratio"], lines
    )


if __name__ == "__main__":
    main()
