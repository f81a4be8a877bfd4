"""Multiple choice: reading, both orders, and numbers by hand and of the model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_overlay
from test_score import one_network, run, values  # noqa: F401  one_network is a fixture

from mindrlhf.cli import UserError
from mindrlhf.inference import multiple_choice as choice
from mindrlhf.inference import score_results

FIRST, SECOND = choice.CHOSEN


def row(question, better, worse, label=FIRST, **meta):
    shown = (better, worse) if label == FIRST else (worse, better)
    prompt = f"问题：{question}\n{FIRST}：{shown[0]}\n{SECOND}：{shown[1]}\n哪个回复更好？"
    about = {"question": question, "pos_resp": better, "neg_resp": worse, **meta}
    return {"prompt": prompt, "label": label, "meta_info": about}


def write(path, rows):
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path, rows):
    return choice.read_quiz([write(tmp_path / "mc.jsonl", rows)])


def test_two_rows_by_hand(tmp_path):
    """The first question stands there in both orders; the second one's other order is made."""
    rows = [
        row("甲？", "好的。", "坏。", FIRST, difficulty_level="hard"),
        row("甲？", "好的。", "坏。", SECOND, difficulty_level="hard"),
        row("乙？", "对。", "错了。", SECOND, difficulty_level="easy", domain_zh="法学"),
    ]
    quiz = read(tmp_path, rows)
    assert (quiz.rows, quiz.one_order) == (3, 0)
    given, made, plain = choice.AS_GIVEN, choice.EXCHANGED, choice.PLAIN
    assert [(trial.form, trial.question, trial.label) for trial in quiz.trials] == [
        *((given, 0, FIRST), (plain, 0, ""), (given, 0, SECOND)),
        *((given, 1, SECOND), (made, 1, FIRST), (plain, 1, "")),
    ]
    exchanged = quiz.pairs[4]
    assert exchanged.messages[0][1] == row("乙？", "对。", "错了。", FIRST)["prompt"]
    assert (exchanged.chosen, exchanged.rejected) == (FIRST, SECOND)
    assert (quiz.pairs[5].messages, quiz.pairs[5].chosen) == ((("user", "乙？"),), "对。")
    # a model that likes answer 1 by 2 nats, but the better answer of question 1 by 3
    logps = np.array([[-1, -3], [-4, -6], [-3, -1], [-2, -3], [-1, -6], [-8, -6]], float)
    tokens = np.array([[2, 2], [4, 3], [2, 2], [2, 2], [2, 2], [2, 3]])
    metrics, slices = choice.describe_choices(quiz.trials, logps, tokens)
    # answer 1: right in trials 0 and 4; wrong in trial 2, where it is chosen; trial 3 chooses 2
    assert metrics == {"answer 1 chosen": 0.75, "right in both orders": 0.5}
    assert {each.name: each.accuracy.value for each in slices["form"]} == {
        given: pytest.approx(2 / 3),
        made: 1.0,
        f"{plain}, sums": 0.5,  # -4 > -6, -8 < -6
        f"{plain}, per token": 0.5,  # -1 > -2, -4 < -2
    }
    assert {each.name: each.accuracy.value for each in slices["right answer"]} == {
        FIRST: 1.0,
        SECOND: 0.5,
    }
    assert [(each.name, each.accuracy.value) for each in slices["difficulty"]] == [
        ("hard", 0.5),
        ("easy", 1.0),
    ]
    assert [each.name for each in slices["domain"]] == ["法学"]


def test_the_model_s_log_probs(golden, tmp_path):
    """Texts of the golden case: the plain questions have the log-probs of preference pairs."""
    yaml = write_overlay(tmp_path / "score.yaml", "score")
    options = ["--config", str(yaml), "--vocab_file", str(golden.tokenizer)]
    pairs = [json.loads(line) for line in golden.pairs.read_text().splitlines()][1:3]
    rows = [row(each["prompt"], each["pos_resp"], each["neg_resp"]) for each in pairs]
    source = write(tmp_path / "mc.jsonl", rows)
    found, lines = run(options, source, golden.checkpoint, tmp_path / "a")
    assert (found.kind, found.reference, found.data["read"]) == ("multiple choice", None, 2)
    assert found.data["trials"] == {"as given": 2, "exchanged": 2, "plain question": 2}
    asked = [line for line in lines if line["form"] != "plain question"]
    assert found.accuracy.value == np.mean([line["margin"] > 0 for line in asked])
    assert found.accuracy.prompts == 2
    assert found.metrics["right in both orders"] in (0, 0.5, 1)
    _, wanted = run(options, *(golden.data, golden.checkpoint, tmp_path / "b"))
    names = ("chosen_logps", "rejected_logps")
    plain = values([line for line in lines if line["form"] == "plain question"], *names)
    assert np.abs(plain - values(wanted[1:3], *names)).max() < 1e-4
    with pytest.raises(UserError, match="multiple choice compares log-probs of one model"):
        run(
            options,
            *(source, golden.checkpoint, tmp_path / "c"),
            *("--reference_checkpoint", golden.checkpoint),
        )


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("1 aa 2 bbb 3", "1 bbb 2 aa 3"),
        ("bbb aa", "aa bbb"),
        ("aa bbb aa", None),
        ("aa", None),
        ("aabbb", "bbbaa"),
    ],
)
def test_exchange(prompt, found):
    assert choice.exchange(prompt, "aa", "bbb") == found
    assert choice.exchange("a aa", "a", "aa") is None
    assert choice.exchange("a b", "", "b") is None


def test_rows_without_answers_have_one_order(tmp_path):
    rows = [{"prompt": "which?", "label": FIRST}, {"prompt": "which one?", "label": SECOND}]
    quiz = read(tmp_path, rows)
    assert quiz.one_order == 2
    metrics, slices = choice.describe_choices(
        quiz.trials, np.array([[-1.0, -2.0], [-1.0, -2.0]]), np.ones((2, 2), int)
    )
    assert metrics == {"answer 1 chosen": 0.5}
    assert [each.name for each in slices["form"]] == ["as given"]


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"prompt": "x", "label": "A"}, "needs 'prompt', a string, and 'label', 回复1 or 回复2"),
        ({"prompt": 1, "label": FIRST}, "not a row of multiple choice"),
        ([1], "not a row of multiple choice"),
        ({"prompt": "x", "label": FIRST, "meta_info": 3}, "'meta_info' is int"),
        ({"prompt": "x", "label": FIRST, "meta_info": {"question": 3}}, "needs strings"),
    ],
)
def test_bad_rows_are_named(tmp_path, wrong, part):
    with pytest.raises(UserError, match=r"mc.jsonl:2: .*" + part):
        read(tmp_path, [row("a?", "b", "c"), wrong])


def test_plain_questions_alone_are_no_multiple_choice():
    """The prompts with both answers were too long for a row."""
    trial = SimpleNamespace(form=choice.PLAIN)
    scored = SimpleNamespace(numbers=np.array([0]))
    source = SimpleNamespace(quiz=SimpleNamespace(trials=[trial]))
    with pytest.raises(UserError, match="no multiple-choice prompt fits into 64 tokens"):
        score_results.choice_score(None, scored, source, seq_len=64)
