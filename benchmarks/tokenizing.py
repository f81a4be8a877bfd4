"""How many pairs a second are tokenized, and cut to fit, without a model?

Each process does its share, as each worker of the preprocessing does. The tokenizer is that of the golden case, whose
316 tokens make more tokens of a text than GLM-4's 151,000, and the texts are random words of its vocabulary.

    python benchmarks/tokenizing.py
"""

import multiprocessing
import time

import data_model
import numpy as np

from mindrlhf.data.features import tokenize_pair, truncate_prompt
from mindrlhf.data.preference import Pair

PAIRS, SEQ_LEN = 8000, 8192
TOKENIZER = data_model.ROOT / "tests/golden/case_1/tokenizer.model"


def make_pairs(tokenizer, count, seed):
    """Pairs of random text with lengths as in data_model.py."""
    random = np.random.default_rng(seed)
    known = [tokenizer.decode([token]) for token in range(256, 316)]
    known = [text for text in known if "\ufffd" not in text]

    def text(tokens):
        return "".join(random.choice(known, tokens))

    return [
        Pair((("user", text(prompt)),), text(chosen), text(rejected))
        for prompt, chosen, rejected in data_model.parts(count, seed)
    ]


def worker(seed, ready, go, results):
    from mindrlhf import runtime

    runtime.quiet_mindformers()
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    tokenizer = Glm4Tokenizer(TOKENIZER)
    pairs = make_pairs(tokenizer, PAIRS, seed)
    ready.release()
    go.wait()
    begin = time.perf_counter()
    tokens = sum(
        truncate_prompt(tokenize_pair(tokenizer, pair), SEQ_LEN, tokenizer=tokenizer)[0].longest
        for pair in pairs
    )
    results.put((time.perf_counter() - begin, tokens))


def measure(workers):
    """Line of the table for a number of processes."""
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
    data_model.table(
        "tokenizing",
        ["processes", "pairs", "tokens of a longer side", "seconds", "pairs/s"],
        [measure(workers) for workers in (1, 2)],
    )
