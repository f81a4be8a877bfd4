"""Preprocessing through its command.

PyTorch's values, no pair lost, any number of workers, kills, bad input.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import dpo_preprocess_glm4_parallel
import numpy as np
import pytest
from conftest import EXAMPLE, GOLDEN, SEQ_LEN, assert_one_error, run_script, write_overlay

from mindrlhf import cli
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, preprocess, summary, validation
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import SIDES

PICTURE = summary.draw_summary
SCRIPT = EXAMPLE / "dpo_preprocess_glm4_parallel.py"
ROWS = [
    json.loads(line) for line in (GOLDEN / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(autouse=True)
def one_model(monkeypatch, made={}):  # noqa: B006  shared by all tests on purpose
    """Build each model once; a run asks for it only when it has pairs to score."""
    build = preprocess.open_scorer

    def cached(settings, tokenizer, *, packed):
        key = (settings["load_checkpoint"], settings["model"]["model_config"]["seq_length"], packed)
        if key not in made:
            made[key] = build(settings, tokenizer, packed=packed)
        return made[key]

    monkeypatch.setattr(preprocess, "open_scorer", cached)
    monkeypatch.setattr(summary, "draw_summary", lambda *_: True)  # half a second each


def write(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def arguments(golden, source, destination, *more):
    return [
        "--src",
        str(source),
        "--dst",
        str(destination),
        "--config",
        str(golden.process),
        "--tokenizer",
        str(golden.tokenizer),
        "--load_checkpoint",
        str(golden.checkpoint),
        *map(str, more),
    ]


def run(golden, source, destination, *more):
    dpo_preprocess_glm4_parallel.main(arguments(golden, source, destination, *more))
    return destination


def rank(monkeypatch, number, workers):
    monkeypatch.setenv("RANK_ID", str(number))
    monkeypatch.setenv("MS_WORKER_NUM", str(workers))


def rows(path):
    return [
        {name: values.tolist() for name, values in row.items()}
        for row in mindrecord.read_rows(path)
    ]


def by_pair(path):
    """Number of a pair -> its log-probs."""
    return {
        number: [row["reference_logps"][row[side][place]] for side in SIDES]
        for row in rows(path)
        for place, number in enumerate(row["pair_ids"])
        if number >= 0
    }


def tokens_of(path):
    """Number of a pair -> its tokens on both sides."""
    found = {}
    for row in mindrecord.read_rows(path):
        answers = validation.read_answers(row)
        for place in range((row["pair_ids"] >= 0).sum()):
            sides = [answers[row[side][place]] for side in SIDES]
            found[int(row["pair_ids"][place])] = [side.prompt + side.response for side in sides]
    return found


def assert_whole(golden, path):
    """Assert that every row of a file is correct and that its sidecar's counts add up."""
    sidecar, special = mindrecord.read_data_sidecar(path), Glm4Tokenizer(golden.tokenizer).special
    assert [validation.check_row(row, sidecar, special) for row in mindrecord.read_rows(path)] == [
        []
    ] * sidecar["rows"]
    pairs = sidecar["pairs"]
    assert len(by_pair(path)) == pairs["written"]
    assert pairs["read"] == pairs["written"] + pairs["in the other file"] + sum(
        pairs["dropped"].values()
    )
    return sidecar


# the numbers


def assert_golden(path, expected):
    found = by_pair(path)
    assert sorted(found) == list(range(8))
    for number, pair in enumerate(expected["pairs"]):
        wanted = [pair["ref_chosen_logps"], pair["ref_rejected_logps"]]
        assert np.abs(np.array(found[number]) - wanted).max() < 3e-4
    assert tokens_of(path) == {
        number: [pair["prompt_ids"] + pair[f"{side}_ids"] for side in SIDES]
        for number, pair in enumerate(expected["pairs"])
    }


def test_the_golden_case_has_pytorch_s_tokens_and_log_probs(golden, expected):
    assert_golden(golden.data, expected)
    assert assert_whole(golden, golden.data)["rows"] < 8


def test_one_pair_a_row(golden, expected, tmp_path):
    path = run(golden, golden.pairs, tmp_path / "a.mindrecord", "--pack", "False")
    assert_golden(path, expected)
    sidecar = assert_whole(golden, path)
    assert (sidecar["rows"], sidecar["pairs_per_row"]) == (8, 1)
    packed = by_pair(golden.data)
    assert (
        max(
            np.abs(np.subtract(values, packed[number])).max()
            for number, values in by_pair(path).items()
        )
        < 1e-4
    )


def test_the_other_spelling_gives_the_same(golden, expected, tmp_path):
    import convert_weight

    weights = tmp_path / "chatglm.ckpt"
    convert_weight.main(
        [
            "--model",
            "glm-n",
            "--input_path",
            f"{GOLDEN / 'hf_chatglm'}/",
            "--output_path",
            str(weights),
            "--dtype",
            "fp32",
        ]
    )
    assert_golden(
        run(golden, golden.pairs, tmp_path / "a.mindrecord", "--load_checkpoint", weights), expected
    )


def test_the_last_screen_and_the_picture(golden, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(summary, "draw_summary", PICTURE)
    path = run(golden, golden.pairs, tmp_path / "a.mindrecord")
    out = capsys.readouterr().out
    pairs = expected["pairs"]
    tokens = sum(
        len(pair["prompt_ids"]) - 1 + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        for pair in pairs
    )
    unshared = tokens + sum(len(pair["prompt_ids"]) - 1 for pair in pairs)
    for side in SIDES:
        mean = sum(pair[f"ref_{side}_logps"] for pair in pairs) / sum(
            len(pair[f"{side}_ids"]) for pair in pairs
        )
        assert f"{side} {mean:.4f}" in out
    longer = sorted(
        len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        for pair in pairs
    )
    assert f"shortest {longer[0]}, " in out
    assert f"longest {longer[-1]} tokens" in out
    assert f"median {(longer[3] + longer[4]) / 2:.0f}, " in out
    assert "8 prompts, 16 answers\n" in out
    assert f"tokens     {tokens:,}, {tokens / (3 * SEQ_LEN):.1%} of all positions; " in out
    assert f"{unshared:,} if each pair repeated its prompt and answers" in out
    assert "8 read = 8 written + 0 dropped" in out
    assert "--dataset_type cvalues (detected from its fields)" in out
    assert (tmp_path / "a.mindrecord.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"{path.name}{end}" for end in ("", ".db", ".json", ".png")
    ]


# no pair lost


@pytest.mark.parametrize("count", [1, 5, 9, 37])
def test_no_pair_is_lost(golden, tmp_path, count):
    """Batches of 4 rows: one pair, a partial batch, counts that are no multiple of anything."""
    source = write(
        tmp_path / "pairs.jsonl",
        [{**ROWS[number % 8], "prompt": f"{number}?"} for number in range(count)],
    )
    sidecar = assert_whole(golden, run(golden, source, tmp_path / "a.mindrecord"))
    assert sidecar["pairs"]["written"] == sidecar["pairs"]["read"] == count


def test_row_order_moves_no_log_prob(golden, tmp_path):
    turned = run(golden, write(tmp_path / "pairs.jsonl", ROWS[::-1]), tmp_path / "a.mindrecord")
    straight = by_pair(golden.data)
    for number, values in by_pair(turned).items():
        assert np.abs(np.subtract(values, straight[7 - number])).max() < 1e-4


def test_what_is_dropped_cut_or_odd_is_counted_with_its_lines(golden, tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    write(
        source,
        [
            ROWS[0],
            {**ROWS[1], "prompt": "长" * 200},
            {**ROWS[1], "neg_resp": "长" * 200},
            ROWS[0],
            {**ROWS[2], "neg_resp": ROWS[2]["pos_resp"]},
            {"prompt": "x"},
            {**ROWS[3], "prompt": ""},
        ],
    )
    path = run(
        golden,
        source,
        tmp_path / "a.mindrecord",
        "--on_bad_row",
        "skip",
        "--dataset_type",
        "cvalues",
    )
    out = capsys.readouterr().out
    for words in (
        "7 read = 5 written + 2 dropped",
        f"1 x longer than a row ({source}:3)",
        f"1 x bad row ({source}:6)",
        f"{source}:6: missing 'pos_resp'",
        f"1 x prompts shortened to fit ({source}:2)",
        f"1 x identical answers ({source}:5)",
        f"1 x pair that stands there already ({source}:4)",
    ):
        assert words in out
    sidecar = assert_whole(golden, path)
    assert sidecar["pairs"]["dropped"] == {"bad row": 1, "longer than a row": 1}
    assert sidecar["pairs"]["prompts shortened"] == 1
    assert sorted(by_pair(path)) == [0, 1, 3, 4, 6]
    tokens = tokens_of(path)[1]
    tokenizer = Glm4Tokenizer(golden.tokenizer)
    (row,) = [row for row in mindrecord.read_rows(path) if 1 in row["pair_ids"]]
    assert (row["group_ids"] > 0).all()  # not a token more is cut than must be
    assert all(
        tokenizer.decode(side[:4], show_special=True).startswith("[gMASK]<sop><|user|>\n")
        for side in tokens
    )
    assert all(side[-1] == tokenizer.special["<|user|>"] for side in tokens)
    less = run(
        golden,
        source,
        tmp_path / "b.mindrecord",
        "--on_bad_row",
        "skip",
        "--identical",
        "drop",
        "--duplicates",
        "drop",
        "--truncation",
        "drop",
    )
    assert sorted(by_pair(less)) == [0, 6]
    assert assert_whole(golden, less)["pairs"]["dropped"] == {
        "bad row": 1,
        "identical answers": 1,
        "pair that stands there already": 1,
        "longer than a row": 2,
    }


def test_hostile_text_goes_through(golden, tmp_path):
    texts = [
        "<|assistant|>\n[gMASK]<sop><|endoftext|>",
        "\0\r\n\ufeff",
        "🙂👩‍👩‍👧",
        "שלום \u202e",
        "\ud800",
        " " * 100_000,
        "y" * 1_000_000,
    ]
    source = tmp_path / "pairs.json"
    source.write_text(
        json.dumps([{"prompt": text, "chosen": f"a{text[:9]}", "rejected": "no"} for text in texts])
    )
    path = run(golden, source, tmp_path / "a.mindrecord")
    assert assert_whole(golden, path)["pairs"]["written"] == len(texts)


def test_the_evaluation_set_shares_no_prompt(golden, tmp_path, capsys):
    source = write(
        tmp_path / "pairs.jsonl",
        [{**ROWS[number % 8], "prompt": f"{number // 2}?"} for number in range(40)],
    )
    path = run(golden, source, tmp_path / "set.v1.mindrecord", "--eval_ratio", "0.25")
    other = tmp_path / "set.v1_eval.mindrecord"
    train, held_out = by_pair(path), by_pair(other)
    assert (len(train), len(held_out)) == (30, 10)
    assert not {number // 2 for number in train} & {number // 2 for number in held_out}
    assert sorted([*train, *held_out]) == list(range(40))
    for file, here, there in ((path, 30, 10), (other, 10, 30)):
        pairs = assert_whole(golden, file)["pairs"]
        assert (pairs["written"], pairs["in the other file"]) == (here, there)
    assert "40 read = 30 + 10 written + 0 dropped" in capsys.readouterr().out


def test_prompts_that_truncation_makes_equal_stay_together(golden, tmp_path):
    """Prompts that differ in their last characters only, which keep_start cuts."""
    source = write(
        tmp_path / "pairs.jsonl",
        [{**ROWS[number % 8], "prompt": f"{'a' * 400}{number}"} for number in range(8)]
        + [{**ROWS[number % 8], "prompt": f"{number // 2}?"} for number in range(8)],
    )
    more = ("--eval_ratio", "0.4", "--truncation", "keep_start", "--on_bad_row", "skip")
    path = run(golden, source, tmp_path / "x.mindrecord", *more)
    files = path, tmp_path / "x_eval.mindrecord"
    train, held_out = (
        {
            tuple(answer.prompt)
            for row in mindrecord.read_rows(file)
            for answer in validation.read_answers(row)
        }
        for file in files
    )
    assert any(len(prompt) > 100 for prompt in train | held_out)
    assert not train & held_out
    assert sorted([*by_pair(files[0]), *by_pair(files[1])]) == list(range(16))


def test_the_evaluation_set_goes_with_the_training_set_that_it_was_made_with(
    golden, tmp_path, capsys
):
    """All its pairs are in the new training file."""
    source = write(tmp_path / "pairs.jsonl", ROWS)
    path = run(golden, source, tmp_path / "x.mindrecord", "--eval_ratio", "0.4")
    other = tmp_path / "x_eval.mindrecord"
    strange = run(golden, source, tmp_path / "y_eval.mindrecord")
    run(golden, source, path, "--overwrite")
    assert f"{other}: removed with the training file" in capsys.readouterr().out
    assert not list(tmp_path.glob("x_eval*"))
    run(golden, source, tmp_path / "y.mindrecord", "--pack", "False")
    run(golden, source, tmp_path / "y.mindrecord", "--overwrite")
    assert strange.exists()  # another run's
    assert len(by_pair(path)) == 8


# workers, kills


@pytest.fixture(scope="module")
def many(golden):
    """300 pairs, so 9 parts. The two pairs of a prompt are 150 rows apart."""
    return write(
        golden.folder / "many.jsonl",
        [{**ROWS[number % 8], "prompt": f"{number % 150}?"} for number in range(300)],
    )


@pytest.fixture(scope="module")
def quiet(golden, many):
    return run(golden, many, golden.folder / "quiet.mindrecord")


def test_equal_prompts_are_found_over_the_whole_source(golden, many, quiet, tmp_path):
    """Some of the four texts of a prompt are equal. Unshared, the log-probs are the same."""
    sidecar = assert_whole(golden, quiet)
    source = [json.loads(line) for line in many.read_text(encoding="utf-8").splitlines()]
    answers = {(row["prompt"], row[name]) for row in source for name in ("pos_resp", "neg_resp")}
    assert (sidecar["prompts"], sidecar["answers"]) == (150, len(answers))
    encode = Glm4Tokenizer(golden.tokenizer).encode
    prompts = [len(encode(f"{number}?")) + 5 for number in range(150)]  # the template adds 5
    assert sidecar["tokens"] == sum(prompts) - 150 + sum(len(encode(x)) + 2 for _, x in answers)
    path = run(golden, many, tmp_path / "a.mindrecord", "--share", "False")
    unshared = assert_whole(golden, path)
    assert (unshared["prompts"], unshared["answers"]) == (300, 600)
    assert unshared["tokens_unshared"] == sidecar["tokens_unshared"]
    assert sidecar["tokens"] < unshared["tokens"] < unshared["tokens_unshared"]
    shared = by_pair(quiet)
    for number, values in by_pair(path).items():
        assert np.abs(np.subtract(values, shared[number])).max() < 1e-4
    assert tokens_of(path) == tokens_of(quiet)


def test_a_prompt_with_more_answers_than_a_row_holds_loses_no_pair(golden, tmp_path, capsys):
    """12 answers of 40 letters, each better than the next: 66 pairs; a row holds 8 answers."""
    answers = [chr(97 + number) * 40 for number in range(12)]
    source = write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "Which one?", "pos_resp": better, "neg_resp": worse}
            for number, better in enumerate(answers)
            for worse in answers[number + 1 :]
        ],
    )
    path = run(golden, source, tmp_path / "a.mindrecord")
    sidecar = assert_whole(golden, path)
    assert sidecar["pairs"]["written"] == sidecar["pairs"]["read"] == 66
    assert (sidecar["prompts"], sidecar["answers"]) == (1, 12)
    assert "x pairs of a prompt exceed a row" in capsys.readouterr().out
    found = by_pair(path)
    best = [found[number][0] for number in range(11)]  # all compare the first answer
    assert np.ptp(best) == 0


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_no_byte_of_a_row(
    golden, many, quiet, tmp_path, monkeypatch, workers
):
    path = tmp_path / "a.mindrecord"
    for number in reversed(range(workers)):
        rank(monkeypatch, number, workers)
        run(golden, many, path)
        assert path.exists() == (number == 0)
        if number == workers - 1:  # its share only
            assert len(
                list(path.with_name("a.mindrecord.parts").glob("part-*.safetensors"))
            ) == len(range(number, 9, workers))
    assert rows(path) == rows(quiet)
    assert not path.with_name("a.mindrecord.parts").exists()


def test_killed_and_started_again_it_gives_the_same_rows(
    golden, many, quiet, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "a.mindrecord"
    folder = path.with_name("a.mindrecord.parts")
    command = [sys.executable, SCRIPT, *arguments(golden, many, path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("part-*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    done = {part.name: part.stat().st_mtime_ns for part in folder.glob("part-*.safetensors")}
    assert len(done) < 9

    with pytest.raises(UserError, match="different options"):
        run(golden, many, path, "--truncation", "drop")
    with pytest.raises(UserError, match="different seq_len, model"):
        run(golden, many, path, "--seq_len", "256")
    left = tmp_path / f".a.mindrecord.{socket.gethostname()}.{process.pid}.tmp"
    left.mkdir()  # as a kill during the merge leaves it
    rank(monkeypatch, 1, 2)
    run(golden, many, path)
    assert (
        done.items()
        <= {
            part.name: part.stat().st_mtime_ns for part in folder.glob("part-*.safetensors")
        }.items()
    )
    rank(monkeypatch, 0, 2)
    run(golden, many, path)
    assert rows(path) == rows(quiet)
    assert not left.exists()
    rank(monkeypatch, 1, 2)  # a worker that comes late finds nothing to do
    monkeypatch.setattr(preprocess, "score_parts", None)
    run(golden, many, path)
    assert not folder.exists()
    rank(monkeypatch, 0, 1)
    capsys.readouterr()
    run(golden, many, path)
    assert "exists already" in capsys.readouterr().out


def test_a_kill_while_the_file_is_written_leaves_the_parts(golden, tmp_path, monkeypatch):
    path, make_row = tmp_path / "a.mindrecord", mindrecord.make_row
    monkeypatch.setattr(
        mindrecord, "make_row", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(golden, golden.pairs, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mindrecord.parts"]
    monkeypatch.setattr(mindrecord, "make_row", make_row)
    monkeypatch.setattr(preprocess, "open_scorer", None)  # nothing is scored again
    assert rows(run(golden, golden.pairs, path)) == rows(golden.data)


def test_a_kill_between_data_and_picture_leaves_no_run_without_its_picture(
    golden, tmp_path, monkeypatch
):
    path = tmp_path / "a.mindrecord"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "draw_summary", killed)
    with pytest.raises(KeyboardInterrupt):
        run(golden, golden.pairs, path)
    assert path.exists()
    monkeypatch.setattr(summary, "draw_summary", PICTURE)
    monkeypatch.setattr(preprocess, "open_scorer", None)
    rank(monkeypatch, 1, 2)
    run(golden, golden.pairs, path)
    assert not path.with_name("a.mindrecord.png").exists()
    rank(monkeypatch, 0, 2)
    run(golden, golden.pairs, path)
    assert path.with_name("a.mindrecord.png").exists()
    assert not path.with_name("a.mindrecord.parts").exists()


def test_progress_is_shown_with_its_speed(golden, many, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINDRLHF_TERMINAL", "1")
    run(golden, many, tmp_path / "a.mindrecord")
    err = capsys.readouterr().err
    assert "score:" in err
    assert "300/300" in err
    assert "pair/s" in err
    assert " tokens/s" in err


@pytest.mark.parametrize(("asked", "taken"), [(3, 3), (10**6, 8), (10**9, 8)])
def test_a_batch_has_no_rows_that_no_part_can_fill(golden, tmp_path, monkeypatch, asked, taken):
    """10**6 rows took 18 GB, for 8 pairs."""
    config = write_overlay(
        tmp_path / "a.yaml", "process", f"runner_config: {{batch_size: {asked}}}"
    )
    sizes = []

    def stopped(settings, *_, **__):
        sizes.append(settings["runner_config"]["batch_size"])
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "open_scorer", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(golden, golden.pairs, tmp_path / "a.mindrecord", "--config", config)
    assert sizes == [taken]


def test_a_source_is_hashed_block_by_block(golden, tmp_path, monkeypatch):
    read, read_bytes = [], type(golden.pairs).read_bytes

    def noted(path):
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(type(golden.pairs), "read_bytes", noted)
    run(golden, golden.pairs, tmp_path / "a.mindrecord")
    assert golden.pairs not in read  # as a whole, 10 GB of pairs would take 10 GB more
    about = json.loads((tmp_path / "a.mindrecord.json").read_text())
    assert about["source"][0]["sha256"] == hashlib.sha256(read_bytes(golden.pairs)).hexdigest()


# one model over all cards

PLAN = (
    "parallel: {parallel_mode: 1, full_batch: FULL}\n"
    "parallel_config: {data_parallel: 1, model_parallel: 2, vocab_emb_dp: False}"
)


def test_in_a_model_parallel_plan_all_compute_every_part_and_rank_0_writes(
    golden, tmp_path, monkeypatch
):
    path, scored = tmp_path / "a.mindrecord", []
    plan = write_overlay(tmp_path / "plan.yaml", "process", PLAN.replace("FULL", "True"))
    open_scorer = preprocess.open_scorer

    def counted(settings, tokenizer, *, packed):
        alone = {**settings, "parallel": {"parallel_mode": 0}}
        scorer = open_scorer(alone, tokenizer, packed=packed)

        def score(pairs, report):
            scored.append(len(pairs.pairs))
            return scorer(pairs, report)

        score.seq_len = scorer.seq_len
        return score

    monkeypatch.setattr(preprocess, "open_scorer", counted)
    for number in (1, 0):
        rank(monkeypatch, number, 2)
        run(golden, golden.pairs, path, "--config", plan)
        assert path.exists() == (number == 0)
        assert path.with_name("a.mindrecord.parts").exists() is False
    assert scored == [8, 8]
    assert rows(path) == rows(golden.data)
    rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match=r"data_parallel \* model_parallel = 2, but 3 worker"):
        run(golden, golden.pairs, path, "--config", plan)
    partial = write_overlay(tmp_path / "partial.yaml", "process", PLAN.replace("FULL", "False"))
    rank(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="full_batch"):
        run(golden, golden.pairs, path, "--config", partial)


# bad input

BAD = [
    (["--src", "none.jsonl"], "no such file"),
    (["--src", "folder"], "holds no data"),
    (["--src", "empty"], "is empty"),
    (["--src", "broken.jsonl"], "broken.jsonl:2: not JSON"),
    (["--src", "fields.jsonl"], "fields.jsonl:1: "),
    (["--src", "answer.jsonl"], "answer.jsonl:1: 'pos_resp' is empty"),
    (["--dst", "folder"], "is a folder"),
    (["--tokenizer", "broken.jsonl"], "not a line of GLM-4's tokenizer.model"),
    (["--tokenizer", "none"], "no such file"),
    (["--load_checkpoint", "none.ckpt"], "no such file"),
    (["--load_checkpoint", "folder"], "is a folder"),
    (["--load_checkpoint", "junk.ckpt"], "incomplete or damaged MindSpore checkpoint"),
    (["--config", "typo.yaml"], "did you mean"),
    (["--seq_len", "0"], "expected a positive integer"),
    (["--seq_len", "16"], "no pair for it fits into 16 tokens"),
    (["--eval_ratio", "1"], "at least 0 and below 1"),
    (["--dataset_type", "dpo"], "missing 'conversations'"),
    (["--pack", "maybe"], "expected True or False"),
    (["--dest", "x"], "unrecognized"),
]


@pytest.fixture
def places(tmp_path, golden, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "junk.ckpt").write_bytes(b"junk" * 9)
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    write(tmp_path / "fields.jsonl", [{"prompt": "x"}])
    write(tmp_path / "answer.jsonl", [{**ROWS[0], "pos_resp": ""}])
    write_overlay(tmp_path / "typo.yaml", "process", "runner_config: {batchsize: 4}")
    return tmp_path


@pytest.mark.parametrize(("more", "words"), BAD)
def test_bad_input_is_one_line_and_nothing_is_left(golden, places, more, words):
    before = sorted(places.rglob("*"))
    with pytest.raises(UserError) as caught:
        run(golden, golden.pairs, places / "new" / "a.mindrecord", *more)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in sorted(places.rglob("*")) if path not in before] in (
        [],
        [places / "new"],
    )


def test_the_command_ends_with_status_2(golden, places):
    result = run_script(SCRIPT, *arguments(golden, "broken.jsonl", "a.mindrecord"), cwd=places)
    assert_one_error(result, "broken.jsonl:2: not JSON")
    assert not (places / "a.mindrecord").exists()


def test_weights_that_do_not_fit_are_refused(golden, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real model
    other = (
        write_overlay(tmp_path / "other.yaml", "process", "")
        .read_text()
        .replace("num_layers: 3", "num_layers: 2")
    )
    (tmp_path / "other.yaml").write_text(other)
    weights = shutil.copy(golden.checkpoint, tmp_path / "golden.ckpt")
    with pytest.raises(UserError, match=r"golden\.ckpt: .*(layers\.2|num_layers is 2)"):
        run(
            golden,
            golden.pairs,
            tmp_path / "a.mindrecord",
            "--config",
            tmp_path / "other.yaml",
            "--load_checkpoint",
            weights,
        )
    assert not (tmp_path / "a.mindrecord").exists()


def test_the_launcher_s_environment_is_read(monkeypatch):
    rank(monkeypatch, 3, 8)
    assert (cli.rank(), cli.workers()) == (3, 8)
    assert os.environ["RANK_ID"] == "3"
