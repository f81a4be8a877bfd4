"""show: rows as a reader sees them, and every kind of damage found."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, assert_one_error

from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, show, validation
from mindrlhf.data.features import TokenPair
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Glm4Tokenizer(golden.tokenizer)


@pytest.fixture
def sidecar(golden):
    return mindrecord.read_data_sidecar(golden.data)


@pytest.fixture
def row(golden):
    return {
        name: values.copy()
        for name, values in next(iter(mindrecord.read_rows(golden.data))).items()
    }


def test_rows_are_printed_group_by_group_with_the_scored_tokens_marked(golden, expected, capsys):
    show.main([str(golden.data), "-n", "3", "--tokenizer", str(golden.tokenizer)])
    out = capsys.readouterr().out
    assert out.count("\nrow ") + out.startswith("row ") == 3
    assert "    [gMASK]<sop><|user|>\\n关于排队，你怎么看？<|assistant|>\n" in out
    assert (
        "      [[\\n谢谢你的提问！可以从小事做起：first, make a plan；然后一步一步来。<|user|>]]\n"
    ) in out
    for number, pair in enumerate(expected["pairs"]):
        found = re.search(
            rf"answer \d+: {len(pair['chosen_ids'])} scored, reference (\S+) nats, .* per token, "
            rf"chosen in {number}\n",
            out,
        )
        assert float(found[1]) == pytest.approx(pair["ref_chosen_logps"], abs=1e-3)
    assert (
        out.rstrip().splitlines()[-1].startswith(f"{golden.data}: 3 rows with 8 pairs are valid: ")
    )


def test_an_answer_names_all_its_pairs(sidecar, tokenizer, capsys):
    pairs = [TokenPair([1, 2], [10], [20, 21]), TokenPair([1, 2], [20, 21], [30])]
    (row,) = mindrecord.make_rows(pairs, np.full((2, 2), -1), seq_len=48, pad_id=0)
    show.print_row(0, row, tokenizer)
    out = capsys.readouterr().out
    assert "row 0: 2 pairs of 3 answers, 5 tokens of 48\n  group 0: prompt of 2 tokens\n" in out
    assert "per token, rejected in 0, chosen in 1\n" in out


def test_json_lines_hold_what_pytorch_scored(golden, expected, capsys):
    show.main([str(golden.data), "--json"])
    found = {}
    for line in capsys.readouterr().out.splitlines():
        entry = json.loads(line)
        found[entry.pop("pair")] = entry
    assert sorted(found) == list(range(8))
    for number, pair in enumerate(expected["pairs"]):
        for side in ("chosen", "rejected"):
            logps = found[number].pop(f"reference_{side}_logps")
            assert logps == pytest.approx(pair[f"ref_{side}_logps"], abs=3e-4)
        assert found[number] == {
            name: pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }


def test_a_check_needs_the_tokenizer(golden):
    with pytest.raises(UserError, match="--tokenizer is needed"):
        show.main([str(golden.data)])


def test_the_module_runs_by_its_name(golden, monkeypatch):
    import subprocess
    import sys

    command = [sys.executable, "-m", "mindrlhf.data.show", str(golden.data), "--tokenizer"]
    good = subprocess.run(
        [*command, str(golden.tokenizer)], capture_output=True, text=True, cwd=ROOT
    )
    assert good.returncode == 0
    assert good.stderr == ""
    assert_one_error(
        subprocess.run([*command, str(golden.data)], capture_output=True, text=True, cwd=ROOT),
        "tokenizer",
    )


def test_another_tokenizer_is_refused(golden, tmp_path):
    other = tmp_path / "tokenizer.model"
    other.write_text("".join(golden.tokenizer.read_text().splitlines(True)[:-1]))
    with pytest.raises(UserError, match="tokenizer was 22023220ad0c"):
        show.main([str(golden.data), "--tokenizer", str(other)])


def place(name, at, value):
    def damage(row):
        row[name][at] = value

    return damage


def scored(row, answer=1):
    return np.flatnonzero(row["answer_ids"] == answer)


def shift_answers(row):
    row["answer_ids"] = np.roll(row["answer_ids"], 1)


def forget_stop(row):
    """As a template without a stop token would."""
    row["labels"][scored(row)[-1]] = 11


def second_prefix(row):
    begin = scored(row)[0]
    row["input_ids"][begin + 1] = row["labels"][begin] = 318


def score_prompt(row):
    row["answer_ids"][scored(row)[0] - 1] = 1


def drop_first(row):
    row["answer_ids"][scored(row)[0]] = 0


def other_prompt(row):
    row["input_ids"][scored(row, 2)[0]] += 1


def compare_two_groups(row):
    row["rejected"][0] = row["rejected"][1]


DAMAGES = [
    (shift_answers, "padding is scored"),
    (forget_stop, "does not end with <|user|>"),
    (second_prefix, "special"),
    (score_prompt, "does not end with <|assistant|>"),
    (drop_first, "does not end with <|assistant|>"),
    (other_prompt, "its answers have two prompts"),
    (compare_two_groups, "pair 0 has two prompts"),
    (place("input_ids", 0, 3), "does not begin with"),
    (place("labels", 40, 3), "labels are not the next tokens"),
    (place("input_ids", 40, 3), "labels are not the next tokens"),
    (place("positions", 3, 9), "positions do not continue"),
    (place("answer_ids", -1, 1), "padding is scored"),
    (place("answer_ids", 1, 1), "answer ids"),
    (place("group_ids", 3, 7), "group ids"),
    (place("group_ids", slice(None), 0), "group ids"),
    (place("answer_ids", slice(None), 0), "does not end with an answer"),
    (place("reference_logps", 0, np.nan), "not finite"),
    (place("reference_logps", 1, -np.inf), "not finite"),
    (place("reference_logps", 1, 0.5), "above 0"),
    (place("reference_logps", -1, -1), "where there is no answer"),
    (place("answer_tokens", 0, 1), "answer_tokens"),
    (place("pair_ids", slice(None), -1), "pair_ids"),
    (place("pair_ids", 0, -1), "pair_ids"),
    (place("chosen", 0, 99), "chosen: a pair refers to an answer"),
    (place("rejected", -1, 0), "where there is no pair"),
    (place("rejected", 0, 0), "an answer belongs to no pair"),
    (lambda row: row.pop("labels"), "no column labels"),
    (lambda row: row.update(pair_ids=row["pair_ids"][:-1]), "pair_ids is int32"),
    (
        lambda row: row.update(reference_logps=row["reference_logps"].astype(np.float64)),
        "is float64",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_every_damage_to_a_row_is_found(golden, sidecar, tokenizer, damage, words):
    row = next(
        {name: values.copy() for name, values in row.items()}
        for row in mindrecord.read_rows(golden.data)
        if (row["pair_ids"] >= 0).sum() == 2
    )
    assert validation.check_row(row, sidecar, tokenizer.special) == []
    damage(row)
    problems = validation.check_row(row, sidecar, tokenizer.special)
    assert any(words in problem for problem in problems), problems


def test_a_file_with_a_wrong_count_or_a_pair_twice_is_found(
    golden, row, sidecar, tokenizer, tmp_path, capsys
):
    problems = show.check_file([row, row], sidecar, tokenizer.special)
    pairs = 2 * int((row["pair_ids"] >= 0).sum())
    assert problems == [
        "2 rows, 3 in the sidecar",
        f"{pairs} pairs, 8 in the sidecar",
        "a pair occurs twice in the file",
    ]
    path = tmp_path / "damaged.mindrecord"
    forget_stop(row)
    mindrecord.write_rows(path, [row], {**sidecar, "rows": 1})
    with pytest.raises(UserError, match="damaged.mindrecord: row 0: answer 0: .*Preprocess again"):
        show.main([str(path), "--tokenizer", str(golden.tokenizer)])
    assert "row 0" in capsys.readouterr().out  # the mistake can be seen
    shutil.rmtree(tmp_path)
