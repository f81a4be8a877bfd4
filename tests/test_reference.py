"""The reference pass: log-probs that do not depend on the batch, and parts that survive kills."""

import inspect
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, SEQ_LEN, load_model
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf import config
from mindrlhf.cli import UserError
from mindrlhf.data import reference
from mindrlhf.data.features import TokenPair
from mindrlhf.data.parts import LARGEST, SMALLEST, Part
from mindrlhf.data.reference import Parts, Scorer, make_part, part_size
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer


@pytest.fixture(scope="module")
def scorer(golden):
    from mindrlhf.data import preprocess

    settings = config.load_settings(
        golden.process,
        run_mode="preprocess",
        overrides={
            "load_checkpoint": str(golden.checkpoint),
            "processor.tokenizer.vocab_file": str(golden.tokenizer),
        },
    )
    return preprocess.open_scorer(settings, Glm4Tokenizer(golden.tokenizer), packed=True)


@pytest.fixture(scope="module")
def pairs(expected):
    return [
        TokenPair(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
        for pair in expected["pairs"]
    ]


@pytest.fixture(scope="module")
def wanted(expected):
    return np.array(
        [[pair["ref_chosen_logps"], pair["ref_rejected_logps"]] for pair in expected["pairs"]]
    )


def test_log_probs_are_pytorch_s_in_any_company(scorer, pairs, wanted):
    """Packed, alone in a row, in another order, in larger batches: within 1e-4 of each other and
    3e-4 of PyTorch.
    """
    packed = scorer(pairs)
    assert packed.dtype == np.float32
    assert np.abs(packed - wanted).max() < 3e-4
    turned = scorer(pairs[::-1])[::-1]
    company = scorer(pairs[:1] + pairs[3:] * 3)[:1]
    alone = np.concatenate([scorer([pair]) for pair in pairs])
    single = Scorer(
        scorer.network.model, seq_len=scorer.seq_len, batch_size=1, pad_id=5, packed=False
    )
    assert single.width == 1
    for other in (turned, alone, single(pairs)):
        assert np.abs(other - packed).max() < 1e-4
    assert np.abs(company - packed[:1]).max() < 1e-4


def test_logits_in_chunks_give_the_same(golden, pairs, wanted):
    """200 of 2 x 2 x 320 positions at a time; the last chunk is not full."""
    model = load_model(golden, "process", {"dpo.logps_chunk_size": 200})
    chunked = Scorer(model, seq_len=SEQ_LEN, batch_size=2, pad_id=316)
    assert np.abs(chunked(pairs) - wanted).max() < 3e-4
    assert (
        np.abs(Scorer(model, seq_len=SEQ_LEN, batch_size=1, pad_id=316)(pairs) - wanted).max()
        < 3e-4
    )


def test_progress_counts_pairs_and_real_tokens(scorer, pairs):
    told = []
    scorer(pairs * 4, lambda *counts: told.append(counts))
    assert [count for count, _ in told] == sorted(count for count, _ in told)
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert told[-1] == (32, 4 * tokens)


def test_log_probs_that_are_not_finite_stop_the_run(scorer, pairs, monkeypatch):
    monkeypatch.setattr(
        scorer,
        "_run",
        lambda rows: np.full((2, scorer.batch_size, scorer.width), np.nan, np.float32),
    )
    with pytest.raises(UserError, match="not finite"):
        scorer(pairs)


@given(st.integers(1, 2_000_000))
def test_parts_are_of_a_fair_size(pairs):
    size = part_size(pairs)
    count = -(-pairs // size)
    assert SMALLEST <= size <= LARGEST
    assert count <= 2048
    if pairs >= 64 * SMALLEST * 64:
        assert count % 8 in (0, 7)  # 8 workers end together


class Words:
    """A tokenizer of one id a character; ids from 1000 are special."""

    special = {
        tag: number
        for number, tag in enumerate(
            ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"), 1000
        )
    }

    def encode(self, text):
        return list(map(ord, text))


def test_a_part_holds_every_pair_or_says_that_it_dropped_it():
    from mindrlhf.data.preference import Pair

    pairs = [
        Pair((("user", "q" * length),), "a" * answer, "b")
        for length, answer in ((5, 3), (50, 3), (5, 40), (5, 3))
    ]
    part = make_part(
        Words(), pairs, 100, seq_len=30, score=lambda tokens: np.zeros((len(tokens), 2), np.float32)
    )
    assert part.pairs.tolist() == [100, 101, 103]
    assert part.dropped.tolist() == [102]
    # tags and newline add 5 tokens to a prompt and 2 to an answer: 50 + 5 + 3 + 2 = 60, 30 too many
    assert part.cut.tolist() == [0, 30, 0]
    assert part.lengths.tolist() == [[10, 5, 3], [25, 5, 3], [10, 5, 3]]
    assert len(part.tokens) == part.lengths.sum()


def part_of(numbers):
    """A part of pairs with recognizable tokens."""
    return Part(
        pairs=np.array(numbers, np.int32),
        lengths=np.array([[1, 2, 3]] * len(numbers), np.int32),
        tokens=np.array([10 * n + k for n in numbers for k in range(6)], np.int32),
        logps=np.array([[-n, -n - 0.5] for n in numbers], np.float32),
        cut=np.zeros(len(numbers), np.int32),
        dropped=np.zeros(0, np.int32),
    )


def test_parts_are_read_back_pair_by_pair(tmp_path):
    parts = Parts(tmp_path / "a.mindrecord", 2, {"data": "x"})
    parts.write(1, part_of([2, 3]))
    assert [parts.is_done(number) for number in (0, 1)] == [False, True]
    parts.report(0, 1, 9)
    assert parts.progress() == (3, 2 * 7 + 9)
    parts.write(0, replace(part_of([0]), dropped=np.array([1], np.int32)))
    assert parts.progress() == (4, 3 * 7)
    parts.wait()
    scored = parts.read()
    assert scored.pairs.tolist() == [0, 2, 3]
    assert scored.dropped.tolist() == [1]
    assert scored.tokens(1) == TokenPair([20], [21, 22], [23, 24, 25])
    assert scored.logps[2].tolist() == [-3, -3.5]
    assert scored.sides.tolist() == [[3, 4]] * 3
    (parts.folder / ".part-000000.safetensors.77.tmp").write_text("left by a kill")
    parts.remove()
    assert not parts.folder.exists()


def test_parts_of_another_run_are_refused_and_the_difference_named(tmp_path):
    Parts(tmp_path / "a", 2, {"data": "x", "seq_len": 8, "same": 1}).write(0, part_of([0]))
    other = Parts(tmp_path / "a", 2, {"data": "y", "seq_len": 9, "same": 1})
    for look in (other.check, lambda: other.is_done(0), other.read):
        with pytest.raises(UserError, match=r"different data, seq_len; remove .*a\.parts"):
            look()
    other.path(0).write_bytes(b"junk")
    with pytest.raises(UserError, match="not a part file"):
        other.check()


KILLED = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from mindrlhf.data.preference import Pair
from mindrlhf.data.reference import Parts, make_part
from words import Words

pairs = [
    Pair((("user", "q" * (n % 17)),), "a" * (n % 23 + 1), "b" * (n % 19 + 1)) for n in range(320)
]
parts = Parts(sys.argv[1], 40, {{"data": "x"}})
parts.check()
print("ready", flush=True)

def score(tokens):
    time.sleep(0.01)
    return np.array([[-len(pair.chosen), -len(pair.rejected)] for pair in tokens], np.float32)

for number in range(40):
    if not parts.is_done(number):
        parts.report(number, 1, 1)
        some = pairs[number * 8:][:8]
        parts.write(number, make_part(Words(), some, number * 8, seq_len=64, score=score))
print("done", flush=True)
"""


def content(parts):
    scored = parts.read()
    return [
        (scored.pairs[n], *scored.logps[n].tolist(), scored.tokens(n))
        for n in range(len(scored.pairs))
    ]


def test_killed_20_times_at_random_moments_the_parts_are_those_of_a_quiet_run(tmp_path):
    (tmp_path / "words.py").write_text(inspect.getsource(Words))
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    moments = random.Random(0)

    def start(name):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / name], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        return process

    counts = []
    for _ in range(20):
        process = start("killed")
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts.append(Parts(tmp_path / "killed", 40, {"data": "x"}).done())
    assert counts == sorted(counts)  # nothing that was done is lost
    assert counts[-1] > 0
    for name in ("killed", "quiet"):
        assert start(name).communicate()[0] == "done\n"
    killed, quiet = (Parts(tmp_path / name, 40, {"data": "x"}) for name in ("killed", "quiet"))
    for number in range(40):
        assert killed.path(number).read_bytes() == quiet.path(number).read_bytes()
    assert content(killed) == content(quiet)
    killed.remove()
    assert not killed.folder.exists()


def test_part_identity_survives_json(tmp_path):
    """Tuples become lists in a file; it must still count as the same run."""
    identity = {"eos": (1, 2), "nested": {"a": None, "b": 1e-8}}
    Parts(tmp_path / "a", 1, identity).write(0, part_of([0]))
    Parts(tmp_path / "a", 1, json.loads(json.dumps(identity))).check()
    assert reference.Parts is Parts
