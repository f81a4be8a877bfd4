"""show: rows as a reader sees them, and every kind of damage found."""

import shutil

import numpy as np
import pytest
from conftest import ROOT, assert_one_error

from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, show, validation
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


def test_rows_are_printed_pair_by_pair_with_the_scored_tokens_marked(golden, expected, capsys):
    show.main([str(golden.data), "-n", "2", "--tokenizer", str(golden.tokenizer)])
    out = capsys.readouterr().out
    assert out.count("\nrow ") + out.startswith("row ") == 2
    assert (
        "[gMASK]<sop><|user|>\\n关于排队，你怎么看？<|assistant|>"
        "[[\\n谢谢你的提问！可以从小事做起：first, make a plan；然后一步一步来。<|user|>]]"
    ) in out
    pair = expected["pairs"][0]
    count, scored = len(pair["prompt_ids"]) + len(pair["chosen_ids"]), len(pair["chosen_ids"])
    assert (
        f"chosen: {count} tokens, {scored} scored, reference {pair['ref_chosen_logps']:.3f} nats"
        in out
    )
    assert (
        out.rstrip().splitlines()[-1].startswith(f"{golden.data}: 3 rows with 8 pairs are valid: ")
    )


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


def shift_mask(row):
    row["chosen_loss_mask"] = np.roll(row["chosen_loss_mask"], 1)


def place(name, at, value):
    def damage(row):
        row[name][at] = value

    return damage


def first_scored(row):
    return np.flatnonzero(row["chosen_loss_mask"])[0]


def forget_stop(row):
    """As a template without a stop token would."""
    end = validation.segments(row, "chosen")[0][1]
    row["chosen_input_ids"][end - 1] = row["chosen_labels"][end - 2] = 11


def second_prefix(row):
    begin = first_scored(row)
    row["chosen_input_ids"][begin + 1] = row["chosen_labels"][begin] = 318


def score_prompt(row):
    row["chosen_loss_mask"][first_scored(row) - 1] = 1


def drop_first(row):
    row["chosen_loss_mask"][first_scored(row)] = 0


DAMAGES = [
    (shift_mask, "not one answer up to its end"),
    (forget_stop, "does not end with <|user|>"),
    (second_prefix, "special"),
    (score_prompt, "does not end with <|assistant|>"),
    (drop_first, "does not end with <|assistant|>"),
    (place("chosen_labels", 1, 3), "labels are not the next tokens"),
    (place("rejected_input_ids", 0, 3), "does not begin with"),
    (place("chosen_input_ids", 5, 3), "labels are not the next tokens"),
    (place("rejected_loss_mask", -1, 1), "padding is scored"),
    (place("chosen_loss_mask", 40, 2), "not 0 and 1"),
    (place("chosen_segment_ids", 3, 7), "segment ids"),
    (place("chosen_segment_ids", slice(None), 1), "segment ids"),
    (place("chosen_ref_logps", 0, np.nan), "not finite"),
    (place("rejected_ref_logps", 1, -np.inf), "not finite"),
    (place("rejected_ref_logps", 1, 0.5), "above 0"),
    (place("chosen_ref_logps", 2, -1), "where there is no pair"),
    (place("pair_ids", slice(None), -1), "pair_ids"),
    (place("pair_ids", 0, -1), "pair_ids"),
    (lambda row: row.pop("chosen_labels"), "no column chosen_labels"),
    (lambda row: row.update(pair_ids=row["pair_ids"][:-1]), "pair_ids is int32"),
    (
        lambda row: row.update(chosen_ref_logps=row["chosen_ref_logps"].astype(np.float64)),
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


def test_two_prompts_of_one_pair_are_found(row, sidecar, tokenizer):
    row["chosen_input_ids"][5] = row["chosen_labels"][4] = 7
    assert validation.check_row(row, sidecar, tokenizer.special) == ["a pair has two prompts"]


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
    shift_mask(row)
    mindrecord.write_rows(
        path,
        [row],
        seq_len=sidecar["seq_len"],
        width=sidecar["pairs_per_row"],
        sidecar={**sidecar, "rows": 1},
    )
    with pytest.raises(
        UserError, match="damaged.mindrecord: row 0: chosen of pair 0: .*Preprocess again"
    ):
        show.main([str(path), "--tokenizer", str(golden.tokenizer)])
    assert "row 0" in capsys.readouterr().out  # the mistake can be seen
    shutil.rmtree(tmp_path)
