"""How fast, and in how much memory, does preprocessing come to the reference pass?

    python benchmarks/reading.py [--pairs 200000]

Prints a table with one line per stage: read the JSON lines, hash them, choose the held-out prompts,
bundle the pairs into parts, then tokenize, truncate and find equal prompts and answers part by
part, as one worker that has all parts. The last line is all of it; the title has the peak memory of
the process, all of it and beyond the imports. Three pairs share a prompt; lengths are those of
data_model.py. The tokenizer is that of the golden case, whose 316 tokens make more of a text than
GLM-4's 151,000.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from processes import cpu_model, memory, table
from tokenizing import TOKENIZER, make_pairs

from mindrlhf import runtime
from mindrlhf.data import preference, reference
from mindrlhf.data.parts import split_pairs
from mindrlhf.files import hash_file
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

SEQ_LEN = 8192


def write_rows(path: Path, tokenizer: Any, pairs: int) -> None:
    """Write pairs as cvalues rows; three share a prompt."""
    with open(path, "w", encoding="utf-8") as file:
        for first in range(0, pairs, 30_000):
            count = min(30_000, pairs - first)
            made = make_pairs(tokenizer, -(-count // 3), seed=first)
            rows = (
                {"prompt": f"{first + number} {pair.messages[0][1]}", "pos_resp": a, "neg_resp": b}
                for number, pair in enumerate(made)
                for a, b in itertools.combinations(
                    (pair.chosen, pair.chosen[::-1], pair.rejected), 2
                )
            )
            for row in itertools.islice(rows, count):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Print the table."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--pairs", type=int, default=200_000)
    count = parse.parse_args().pairs
    runtime.quiet_mindformers()  # imports what a worker of preprocessing imports
    tokenizer, times = Glm4Tokenizer(TOKENIZER), {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        times[stage] = time.perf_counter() - begin
        return result

    def tokenize(parts: list[list[int]], pairs: list[preference.Pair]) -> None:
        for members in parts:
            reference.make_part(
                tokenizer,
                [pairs[member] for member in members],
                members,
                seq_len=SEQ_LEN,
                score=lambda found: np.zeros(len(found.answers), np.float32),
            )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        writer = multiprocessing.Process(target=write_rows, args=(path, tokenizer, count))
        writer.start()  # the memory that it takes is not counted
        writer.join()
        size, base = path.stat().st_size, memory("VmRSS")
        pairs = timed("read", lambda: preference.read_pairs([path], "cvalues").pairs)
        timed("hash", lambda: hash_file(path, hashlib.sha256))
        timed("hold out 5 %", lambda: preference.choose_held_out(pairs, 0.05))
        parts = timed("split", lambda: split_pairs(pairs, share=True, batch_positions=SEQ_LEN))
        timed("tokenize", lambda: tokenize(parts, pairs))
    times["all"] = sum(times.values())
    table(
        f"{cpu_model()}: {count:,} pairs, {size / 1e6:.0f} MB; {len(parts)} parts; peak memory "
        f"{memory('VmHWM') / 1e9:.2f} GB, {(memory('VmHWM') - base) / 1e9:.2f} beyond the imports",
        ["stage", "seconds", "pairs/s"],
        [[stage, f"{seconds:.1f}", f"{count / seconds:,.0f}"] for stage, seconds in times.items()],
    )


if __name__ == "__main__":
    main()
