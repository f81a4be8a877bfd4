"""How many pairs a second are tokenized and truncated, without a model?

    python benchmarks/tokenizing.py

Prints a table with one line for one process and one for two. Each process has its own pairs, like
the workers of preprocessing. The tokenizer is that of the golden case; with its 316 tokens a text
becomes more tokens than with GLM-4's 151,000. The texts are random words of its vocabulary.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import data_model
import numpy as np
from processes import ROOT, table

from mindrlhf.data.features import tokenize_pair, truncate_prompt
from mindrlhf.data.preference import Pair

PAIRS, SEQ_LEN = 8000, 8192
TOKENIZER = ROOT / "tests/golden/case_1/tokenizer.model"


def make_pairs(tokenizer: Any, count: int, seed: int) -> list[Pair]:
    """Pairs of random text with lengths as in data_model.py."""
    random = np.random.default_rng(seed)
    known = [tokenizer.decode([token]) for token in range(256, 316)]
    known = [text for text in known if "\ufffd" not in text]

    def text(tokens: int) -> str:
        return "".join(random.choice(known, tokens))

    return [
        Pair((("user", text(prompt)),), text(chosen), text(rejected))
        for prompt, chosen, rejected in data_model.parts(count, seed)
    ]


def worker(seed: int, ready: Any, go: Any, results: Any) -> None:
    """Make pairs, wait for the other workers, and put (seconds, positions of the pairs).

    Args:
        seed: of the pairs.
        ready: semaphore, released once the pairs exist.
        go: event that starts all workers together.
        results: queue for the result.
    """
    from mindrlhf import runtime

    runtime.quiet_mindformers()
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    tokenizer = Glm4Tokenizer(TOKENIZER)
    pairs = make_pairs(tokenizer, PAIRS, seed)
    ready.release()
    go.wait()
    begin = time.perf_counter()
    tokens = sum(
        truncate_prompt(tokenize_pair(tokenizer, pair), SEQ_LEN, tokenizer=tokenizer)[0].size
        for pair in pairs
    )
    results.put((time.perf_counter() - begin, tokens))


def measure(workers: int) -> list[str]:
    """One line of the table."""
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    processes = [
        context.Process(target=worker, args=(seed, ready, go, results)) for seed in range(workers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    times, tokens = zip(*(results.get() for _ in processes))
    for process in processes:
        process.join()
    pairs = workers * PAIRS
    return [
        str(workers),
        f"{pairs:,}",
        f"{sum(tokens) / pairs:.0f}",
        f"{max(times):.2f}",
        f"{pairs / max(times):,.0f}",
    ]


if __name__ == "__main__":
    table(
        "tokenizing",
        ["processes", "pairs", "positions of a pair", "seconds", "pairs/s"],
        [measure(workers) for workers in (1, 2)],
    )
