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
from mindrlhf.data.features import TokenPair
from mindrlhf.data.groups import find_sequences
from mindrlhf.data.parts import BATCHES, LARGEST, SMALLEST, Parts, split_bundles
from mindrlhf.data.reference import Scorer, make_part
from mindrlhf.data.scored import Part
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
    packed = scorer.score_pairs(pairs)
    assert packed.dtype == np.float32
    assert np.abs(packed - wanted).max() < 3e-4
    turned = scorer.score_pairs(pairs[::-1])[::-1]
    company = scorer.score_pairs(pairs[:1] + pairs[3:] * 3)[:1]
    alone = np.concatenate([scorer.score_pairs([pair]) for pair in pairs])
    single = Scorer(
        scorer.network.model, seq_len=scorer.seq_len, batch_size=1, pad_id=5, packed=False
    )
    for other in (turned, alone, single.score_pairs(pairs)):
        assert np.abs(other - packed).max() < 1e-4
    assert np.abs(company - packed[:1]).max() < 1e-4


def test_logits_in_chunks_give_the_same(golden, pairs, wanted):
    """200 of 2 x 384 positions at a time; the last chunk is not full."""
    model = load_model(golden, "process", {"dpo.logps_chunk_size": 200})
    chunked = Scorer(model, seq_len=SEQ_LEN, batch_size=2, pad_id=316)
    assert np.abs(chunked.score_pairs(pairs) - wanted).max() < 3e-4
    single = Scorer(model, seq_len=SEQ_LEN, batch_size=1, pad_id=316)
    assert np.abs(single.score_pairs(pairs) - wanted).max() < 3e-4


def test_progress_counts_pairs_and_real_tokens(scorer, pairs):
    told = []
    scorer(find_sequences(pairs * 4, share=False), lambda *counts: told.append(counts))
    assert [count for count, _ in told] == sorted(count for count, _ in told)
    assert told[-1] == (32, 4 * sum(pair.size for pair in pairs))
    scorer(find_sequences(pairs * 4, share=True), lambda *counts: told.append(counts))
    assert told[-1] == (32, sum(pair.size for pair in pairs))


def test_log_probs_that_are_not_finite_stop_the_run(scorer, pairs, monkeypatch):
    monkeypatch.setattr(
        scorer,
        "_run",
        lambda rows: np.full((scorer.batch_size, scorer.limits.answers), np.nan, np.float32),
    )
    with pytest.raises(UserError, match="not finite"):
        scorer.score_pairs(pairs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.sampled_from([1, 30]))
def test_parts_are_of_a_fair_size_and_divide_no_bundle(sizes, times):
    bundles, first = [], 0
    for size in sizes * times:
        bundles.append(list(range(first, first + size)))
        first += size
    parts = split_bundles(bundles, [0] * len(bundles), 0)
    assert [number for part in parts for number in part] == list(range(first))
    ends = {bundle[-1] for bundle in bundles}
    assert all(part[-1] in ends for part in parts)
    assert all(len(part) >= SMALLEST for part in parts[:-1])
    assert len(parts) <= 64 * -(-first // (64 * LARGEST))
    assert max(map(len, parts)) < LARGEST + max(sizes)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=300), st.integers(1, 2000))
def test_parts_fill_their_batches(tokens, batch_positions):
    """All but the last: at most one batch in BATCHES + 1 is not full."""
    parts = split_bundles([[number] for number in range(len(tokens))], tokens, batch_positions)
    assert [number for part in parts for number in part] == list(range(len(tokens)))
    for part in parts[:-1]:
        needed = sum(tokens[number] for number in part)
        assert needed >= BATCHES * batch_positions
        if len(part) > SMALLEST:
            assert needed < BATCHES * batch_positions + tokens[part[-1]]


@pytest.mark.parametrize("pairs", [64 * SMALLEST * 64, 116_000, 1_000_000])
def test_eight_workers_end_together(pairs):
    parts = split_bundles([[number] for number in range(pairs)], [0] * pairs, 0)
    assert len(parts) % 8 in (0, 7)


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
        Words(),
        pairs,
        range(100, 104),
        seq_len=40,
        score=lambda found: np.arange(len(found.answers), dtype=np.float32),
    )
    assert part.numbers.tolist() == [100, 101, 103]
    assert part.dropped.tolist() == [102]
    # tags and newline add 5 tokens to a prompt and 2 to an answer: a pair takes p - 1 + c + r
    # positions, the second one 55 - 1 + 5 + 3 = 62, 22 too many
    assert part.cut.tolist() == [0, 22, 0]
    assert part.prompts.tolist() == [10, 33]
    assert part.answers.tolist() == [[0, 5], [0, 3], [1, 5], [1, 3]]
    assert part.pairs.tolist() == [[0, 1], [2, 3], [0, 1]]
    assert len(part.tokens) == 10 + 33 + 2 * (5 + 3)


def test_the_pair_whose_log_probs_are_not_finite_is_named(scorer, pairs, monkeypatch):
    from mindrlhf.data.preference import Pair

    def spoil(rows):
        values = np.full((scorer.batch_size, scorer.limits.answers), -1, np.float32)
        for line, row in zip(values, rows):
            answers = [answer for group in row for answer in group.answers]
            line[: len(answers)][[len(answer) == 5 for answer in answers]] = np.inf
        return values

    monkeypatch.setattr(scorer, "_run", spoil)
    texts = [
        Pair((("user", "q" * length),), "a" * answer, "b", place=f"x.jsonl:{length}")
        for length, answer in ((999, 1), (5, 3), (5, 2), (4, 2))  # the first one is dropped
    ]
    with pytest.raises(
        UserError, match=r"^x\.jsonl:5: the model gives .* not finite; .* remove it"
    ):
        make_part(Words(), texts, range(4), seq_len=scorer.seq_len, score=scorer, truncation="drop")


def part_of(numbers):
    """A part of pairs with recognizable tokens."""
    return Part.of(
        find_sequences([TokenPair([10 * n], [10 * n + 1, 10 * n + 2], [3]) for n in numbers], True),
        np.array([value for n in numbers for value in (-n, -n - 0.5)], np.float32),
        numbers=numbers,
        cut=[0] * len(numbers),
        dropped=[],
    )


def pairs_of(scored):
    """(number, prompt, chosen, rejected, their log-probs) of each pair."""
    return [
        (
            int(number),
            scored.prompt(scored.sizes.answers[chosen, 0]),
            scored.answer(chosen),
            scored.answer(rejected),
            *scored.logps[[chosen, rejected]].tolist(),
        )
        for number, (chosen, rejected) in zip(scored.numbers, scored.sizes.pairs.tolist())
    ]


def test_parts_are_read_back_pair_by_pair(tmp_path):
    parts = Parts(tmp_path / "a.mindrecord", 2, {"data": "x"})
    parts.write(1, part_of([2, 3]))
    assert [parts.is_done(number) for number in (0, 1)] == [False, True]
    parts.report(0, 1, 9)
    assert parts.progress() == (3, 2 * 4 + 9)
    parts.write(0, replace(part_of([0]), dropped=np.array([1], np.int32)))
    assert parts.progress() == (4, 3 * 4)
    parts.wait()
    scored = parts.read()
    assert scored.dropped.tolist() == [1]
    assert pairs_of(scored) == [
        (n, [10 * n], [10 * n + 1, 10 * n + 2], [3], -n, -n - 0.5) for n in (0, 2, 3)
    ]
    assert scored.sides.tolist() == [[3, 2]] * 3
    (parts.folder / ".part-000000.safetensors.77.tmp").write_text("left by a kill")
    parts.remove()
    assert not parts.folder.exists()


def test_equal_prompts_of_different_parts_become_one(tmp_path):
    """As after truncation, where different conversations end in the same tokens. Parts may hold
    the pairs in any order.
    """
    parts = Parts(tmp_path / "a.mindrecord", 2, {"data": "x"})
    for part, numbers in enumerate(([0, 3], [1, 2])):
        pairs = [TokenPair([7, 8], [number], [5]) for number in numbers]
        parts.write(
            part,
            Part.of(
                find_sequences(pairs, True),
                np.full(3, part, np.float32),
                numbers=numbers,
                cut=[0, 0],
                dropped=[],
            ),
        )
    for share, prompts, answers in ((True, 1, 5), (False, 2, 6)):
        scored = parts.read(share)
        assert [(pair[0], *pair[1:4]) for pair in pairs_of(scored)] == [
            (number, [7, 8], [number], [5]) for number in range(4)
        ]
        assert len(np.unique(scored.sizes.pairs)) == answers
        assert len(np.unique(scored.sizes.answers[scored.sizes.pairs, 0])) == prompts


def test_parts_of_another_run_are_refused_and_the_difference_named(tmp_path):
    Parts(tmp_path / "a", 2, {"data": "x", "seq_len": 8, "same": 1}).write(0, part_of([0]))
    other = Parts(tmp_path / "a", 2, {"data": "y", "seq_len": 9, "same": 1})
    for look in (other.check, lambda: other.is_done(0), other.read):
        with pytest.raises(UserError, match=r"different data, seq_len; remove .*a\.parts"):
            look()
    other.path(0).write_bytes(b"junk")
    with pytest.raises(UserError, match="not a part file"):
        other.check()


def test_a_flipped_bit_in_a_part_is_found(tmp_path):
    parts = Parts(tmp_path / "a.mindrecord", 1, {"data": "x"})
    parts.write(0, part_of([0, 1, 2]))
    content = parts.path(0).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")  # of the arrays, behind the header
    for place in range(begin, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        parts.path(0).write_bytes(flipped)
        with pytest.raises(UserError, match="damaged after it was written; remove it and repeat"):
            parts.read()
    parts.path(0).write_bytes(content)
    parts.read()


KILLED = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from mindrlhf.data.preference import Pair
from mindrlhf.data.parts import Parts
from mindrlhf.data.reference import make_part
from words import Words

pairs = [
    Pair((("user", "q" * (n % 17)),), "a" * (n % 23 + 1), "b" * (n % 19 + 1)) for n in range(320)
]
parts = Parts(sys.argv[1], 40, {{"data": "x"}})
parts.check()
print("ready", flush=True)

def score(found):
    time.sleep(0.01)
    return np.array([-len(answer) for answer in found.answers], np.float32)

for number in range(40):
    if not parts.is_done(number):
        parts.report(number, 1, 1)
        some = pairs[number * 8:][:8]
        parts.write(number, make_part(Words(), some, range(number * 8, number * 8 + 8), seq_len=64,
                                      score=score))
print("done", flush=True)
"""


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
    assert pairs_of(killed.read()) == pairs_of(quiet.read())
    killed.remove()
    assert not killed.folder.exists()


def test_part_identity_survives_json(tmp_path):
    """Tuples become lists in a file; it must still count as the same run."""
    identity = {"eos": (1, 2), "nested": {"a": None, "b": 1e-8}}
    Parts(tmp_path / "a", 1, identity).write(0, part_of([0]))
    Parts(tmp_path / "a", 1, json.loads(json.dumps(identity))).check()
