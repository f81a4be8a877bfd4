"""How much memory does the reference pass need with logits in chunks, compared with all at once?

    python benchmarks/reference_memory.py

Prints a table with one line per chunk size. Each is measured in a process of its own: its peak
minus what it held before the first pass. The batch has one row of S = 2048 with GLM-4's
vocabulary of 151,552 ids, on a network of one small layer, so that logits dominate:
2048 x 151,552 x 4 bytes = 1.2 GB a copy.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
from processes import ROOT, memory, table

SEQ_LEN, VOCABULARY = 2048, 151_552
CHUNKS = (0, 512, 256, 128)
SIZES = {
    "seq_length": SEQ_LEN,
    "padded_vocab_size": VOCABULARY,
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
}


def measure(chunk: int) -> None:
    """Score one pair with a chunk size; print bytes above the start, seconds, and the log-prob."""
    import mindspore

    from mindrlhf import config, runtime
    from mindrlhf.data.features import TokenPair
    from mindrlhf.data.reference import Scorer
    from mindrlhf.models.glm4 import build

    settings = config.load_settings(
        ROOT / "examples/glm4_dpo/process_glm4_tiny.yaml",
        run_mode="preprocess",
        overrides={
            "dpo.logps_chunk_size": chunk,
            **{f"model.model_config.{name}": value for name, value in SIZES.items()},
        },
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    mindspore.set_seed(0)
    model = build.build_network(run)
    random = np.random.default_rng(0)
    pair = TokenPair(
        *(random.integers(0, VOCABULARY, count).tolist() for count in (24, 1000, 1000))
    )
    scorer = Scorer(model, seq_len=SEQ_LEN, batch_size=1, pad_id=0)
    before = memory("VmRSS")
    scorer.score_pairs([pair])
    peak = memory("VmHWM") - before
    begin = time.perf_counter()
    logps = scorer.score_pairs([pair])
    print("result", peak, time.perf_counter() - begin, float(logps[0, 0]))


def main() -> None:
    """Print the table."""
    results = {}
    for chunk in CHUNKS:
        done = subprocess.run(
            [sys.executable, __file__, str(chunk)], capture_output=True, text=True
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("result")]
        if done.returncode or not found:
            sys.exit(done.stderr)
        results[chunk] = [float(value) for value in found[0].split()[1:]]
    all_at_once = results[0][0]
    table(
        f"reference pass, S = {SEQ_LEN}, vocabulary {VOCABULARY:,}, one row",
        ["positions at once", "peak, GB", "share", "seconds", "log-prob"],
        [
            [
                "all" if not chunk else str(chunk),
                f"{peak / 1e9:.2f}",
                f"{peak / all_at_once:.0%}",
                f"{seconds:.1f}",
                f"{logp:.3f}",
            ]
            for chunk, (peak, seconds, logp) in results.items()
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(int(sys.argv[1]))
    else:
        main()
