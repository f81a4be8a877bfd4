"""Preference files: all formats, all kinds of bad rows, repeated pairs and the evaluation split."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.cli import UserError
from mindrlhf.data import preference
from mindrlhf.data.preference import Pair, choose_held_out, read_pairs


def message(role, text):
    return {"role": role, "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


USER, QUESTION = message("user", "Q"), (("user", "Q"),)
CVALUES = {"prompt": "Q", "pos_resp": "good", "neg_resp": "bad"}


def write(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def one(tmp_path, row, kind="auto"):
    source = read_pairs([write(tmp_path / "pairs.jsonl", [row])], kind)
    return source.dataset_type, source.pairs[0]


FORMATS = {
    "cvalues": (CVALUES, "cvalues", QUESTION),
    "dpo": (
        {
            "conversations": [said("human", "Q")],
            "chosen": said("gpt", "good"),
            "rejected": said("gpt", "bad"),
        },
        "dpo",
        QUESTION,
    ),
    "dpo, history and system": (
        {
            "system": "S",
            "conversations": [said("human", "A"), said("gpt", "B"), said("human", "Q")],
            "chosen": said("gpt", "good"),
            "rejected": said("gpt", "bad"),
        },
        "dpo",
        (("system", "S"), ("user", "A"), ("assistant", "B"), *QUESTION),
    ),
    "dpo, strings": (
        {
            "conversations": [said("system", "S"), said("user", "Q")],
            "chosen": "good",
            "rejected": "bad",
        },
        "dpo",
        (("system", "S"), *QUESTION),
    ),
    "pairs, strings": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "pairs", QUESTION),
    "pairs, messages": (
        {
            "prompt": [message("system", "S"), USER],
            "chosen": [message("assistant", "good")],
            "rejected": [message("assistant", "bad")],
        },
        "pairs",
        (("system", "S"), *QUESTION),
    ),
    "pairs, implicit messages": (
        {
            "chosen": [USER, message("assistant", "B"), USER, message("assistant", "good")],
            "rejected": [USER, message("assistant", "B"), USER, message("assistant", "bad")],
        },
        "pairs",
        (*QUESTION, ("assistant", "B"), *QUESTION),
    ),
    "pairs, a prompt that the conversations repeat": (
        {
            "prompt": "Q",
            "chosen": [USER, message("assistant", "good")],
            "rejected": [USER, message("assistant", "bad")],
        },
        "pairs",
        QUESTION,
    ),
    "pairs, one message each": (
        {
            "prompt": "Q",
            "chosen": [message("assistant", "good")],
            "rejected": [message("assistant", "bad")],
        },
        "pairs",
        QUESTION,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    row, kind, messages = FORMATS[name]
    assert one(tmp_path, row) == (kind, Pair(messages, "good", "bad"))
    assert one(tmp_path, row, kind) == (kind, Pair(messages, "good", "bad"))


ANSWER = {"chosen": "a", "rejected": "b"}
BAD = [
    ("cvalues", "{", "not JSON"),
    ("cvalues", '{"a": ' + "[" * 100_000, "nested too deep"),
    ("cvalues", "3", "got int"),
    (
        "cvalues",
        {"prompt": "Q", "pos_resp": "good"},
        "missing 'neg_resp'; a cvalues row has prompt, pos_resp, neg_resp",
    ),
    ("cvalues", {**CVALUES, "neg_resp": " \n"}, "'neg_resp' is empty"),
    ("cvalues", {**CVALUES, "prompt": None}, "'prompt' is NoneType"),
    ("cvalues", '{"prompt": ' + "9" * 5000 + "}", "not JSON"),
    (
        "cvalues",
        '{"prompt": "Q", "pos_resp": "good", "neg_resp": "bad", "pos_resp": "bad"}',
        "has the key 'pos_resp' twice",
    ),
    ("pairs", '{"prompt": [{"role": "user", "role": "user"}]}', "has the key 'role' twice"),
    ("auto", {"a": 1}, "auto needs the fields of one type .*; this row has: a"),
    ("auto", "3", "this row has: int"),
    (
        "pairs",
        {"prompt": "Q", "chosen": 1, "rejected": "bad"},
        "'chosen' is int but 'rejected' is str",
    ),
    ("pairs", {"prompt": 3, **ANSWER}, "'prompt' is not a list of messages"),
    ("implicit", {"chosen": "same", "rejected": "same"}, "one answer is a prefix"),
    ("implicit", {"chosen": "Q good", "rejected": "Q"}, "one answer is a prefix"),
    ("implicit", {"chosen": "good", "rejected": "bad"}, "no common prefix"),
    ("implicit", {"chosen": 1, "rejected": 2}, "'chosen' is int; expected a string"),
    ("implicit", {"chosen": "Q a", "rejected": "Q b", "text": "P"}, "but text in 'text'; rename"),
    ("pairs", {"chosen": [USER], "rejected": [USER]}, "'prompt' holds no message"),
    (
        "pairs",
        {
            "chosen": [USER, message("assistant", "a")] * 2,
            "rejected": [USER, message("assistant", "b")] * 2,
        },
        "share 1 messages of 4 and 4",
    ),
    ("pairs", {"prompt": [message("robot", "x")], **ANSWER}, "the role 'robot'"),
    ("pairs", {"prompt": [USER, message("assistant", "x")], **ANSWER}, "ends with the assistant"),
    ("pairs", {"prompt": [{"role": "user"}], **ANSWER}, "'prompt of user' is NoneType"),
    (
        "pairs",
        {
            "prompt": "Q",
            "chosen": [{**message("assistant", ""), "tool_calls": [1]}],
            "rejected": [message("assistant", "b")],
        },
        "tool_calls",
    ),
    ("dpo", {"conversations": [], **ANSWER}, "holds no message"),
    (
        "dpo",
        {"conversations": [said("human", "Q")], **ANSWER, "chosen": said("human", "a")},
        "holds user",
    ),
    ("dpo", {"conversations": [said("human", "Q")], **ANSWER, "chosen": {}}, "the role None"),
]
GOOD = {
    "cvalues": CVALUES,
    "auto": CVALUES,
    "pairs": {"prompt": "Q", **ANSWER},
    "implicit": {"chosen": "Q a", "rejected": "Q b"},
    "dpo": {"conversations": [said("human", "Q")], **ANSWER},
}


@pytest.mark.parametrize(("kind", "row", "why"), BAD)
def test_a_bad_row_is_named_by_file_and_line_and_may_be_skipped(tmp_path, kind, row, why):
    path = tmp_path / "pairs.jsonl"
    line, good = row if isinstance(row, str) else json.dumps(row), json.dumps(GOOD[kind])
    path.write_text(f"\n\n{line}\n{good}\n")
    with pytest.raises(UserError, match=rf"pairs\.jsonl:3: .*{why}") as caught:
        read_pairs([path], kind)
    assert "\n" not in str(caught.value)
    source = read_pairs([path], kind, skip_bad=True)
    assert source.dropped == {preference.BAD: [f"{path}:3"]}
    assert source.bad[0].startswith(f"{path}:3: ")
    assert source.read == 2
    assert [pair.number for pair in source.pairs] == [1]  # bad rows count


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        json.dumps(CVALUES).encode() + b"\n" + '{"prompt": "问'.encode("gbk") + b'"}\n'
    )
    with pytest.raises(UserError, match=r":2: not UTF-8 \(byte"):
        read_pairs([path])


def test_an_array_has_line_numbers(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([CVALUES, CVALUES, {**CVALUES, "pos_resp": ""}], indent=1))
    with pytest.raises(
        UserError, match=r"pairs\.json:12: 'pos_resp' is empty"
    ):  # [, five lines a row, from line 2
        read_pairs([path])
    assert len(read_pairs([path], skip_bad=True).pairs) == 2


def test_a_repeated_key_in_an_array_is_one_bad_row(tmp_path):
    row, path = json.dumps(CVALUES), tmp_path / "pairs.json"
    path.write_text(f'[{row},\n{row[:-1]}, "prompt": "R"}},\n{row}]')
    with pytest.raises(UserError, match=r"pairs\.json:2: has the key 'prompt' twice"):
        read_pairs([path])
    source = read_pairs([path], skip_bad=True)
    assert [pair.place for pair in source.pairs] == [f"{path}:1", f"{path}:3"]


def test_a_repeated_key_in_a_broken_line_says_nothing_about_the_next(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": {"b": 1, "b": 2}, \n' + json.dumps(CVALUES) + "\n")
    assert len(read_pairs([path], skip_bad=True).pairs) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [("[{}\n {}]", 2), ("[{},\n\n {", 3), ("[{}]\nmore", 2), ("[{},\n", 2), ("[", 1)],
)
def test_a_broken_array_is_an_error_in_any_case(tmp_path, text, line):
    path = tmp_path / "pairs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"pairs\.json:{line}: not JSON"):
        read_pairs([path], skip_bad=True)


def test_files_are_read_in_natural_order_plain_or_packed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (10, 2, 1):
        write(folder / f"part_{number}.jsonl", [{**CVALUES, "prompt": f"{number}"}])
    with gzip.open(folder / "part_3.json.gz", "wt") as file:
        json.dump([{**CVALUES, "prompt": "3"}], file)
    for name in ("notes.txt", "old.mindrecord.json", ".part_0.jsonl"):
        (folder / name).write_text("no data")
    prompts = [pair.messages[0][1] for pair in read_pairs([folder]).pairs]
    assert prompts == ["1", "2", "3", "10"]
    assert [
        pair.place for pair in read_pairs([folder / "part_10.jsonl", folder / "part_2.jsonl"]).pairs
    ] == [f"{folder}/part_2.jsonl:1", f"{folder}/part_10.jsonl:1"]
    with pytest.raises(UserError, match="named twice"):
        read_pairs([folder, folder / "part_1.jsonl"])


def test_paths_without_data(tmp_path):
    for path, why in ((tmp_path / "none", "no such file"), (tmp_path, "holds no data")):
        with pytest.raises(UserError, match=why):
            read_pairs([path])
    for content, why in (("", "is empty"), ("\n \n", "holds no pairs"), ("[]", "holds no pairs")):
        (tmp_path / "pairs.json").write_text(content)
        with pytest.raises(UserError, match=why):
            read_pairs([tmp_path / "pairs.json"])
    (tmp_path / "pairs.json.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    with pytest.raises(UserError, match="not a complete gzip file"):
        read_pairs([tmp_path / "pairs.json.gz"])
    (tmp_path / "pairs.json").write_text("{}\n")
    with pytest.raises(UserError, match="holds no pairs .*1 x bad row.*pairs.json:1: "):
        read_pairs([tmp_path / "pairs.json"], skip_bad=True)


def test_hostile_text_arrives_as_it_was_written(tmp_path):
    text = "<|user|>\0\r\n🙂\u202eשלום \x85\u2028 end" + "长" * 400_000
    path = tmp_path / "pairs.jsonl"
    row = json.dumps({**CVALUES, "prompt": "", "pos_resp": text}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n" + row.encode() + b"\r\n")
    source = read_pairs([path])
    assert source.read == 2
    assert source.pairs[0] == Pair((("user", ""),), text, "bad")
    assert source.noted[preference.EMPTY_PROMPT] == [f"{path}:1", f"{path}:2"]


def test_lone_surrogates_are_replaced_and_noted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude42 \\ud83d", "pos_resp": "good", "neg_resp": "bad"}\n')
    source = read_pairs([path])
    assert source.pairs[0].messages == (("user", "🙂 \ufffd"),)
    assert source.noted == {preference.SURROGATES: [f"{path}:1"]}


def test_identical_answers_and_repeated_pairs(tmp_path):
    rows = [CVALUES, {**CVALUES, "neg_resp": "good"}, CVALUES, {**CVALUES, "prompt": "Q2"}]
    path = write(tmp_path / "pairs.jsonl", rows)
    kept = read_pairs([path])
    assert len(kept.pairs) == 4
    assert kept.noted == {preference.IDENTICAL: [f"{path}:2"], preference.DUPLICATE: [f"{path}:3"]}
    less = read_pairs([path], drop=[preference.IDENTICAL, preference.DUPLICATE])
    assert [pair.number for pair in less.pairs] == [0, 3]
    assert less.dropped == kept.noted
    assert less.read == 4


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.floats(0, 0.99))
def test_no_prompt_is_on_both_sides(prompts, ratio):
    pairs = [
        Pair((("user", f"question {number}"),), f"a{place}", "b")
        for place, number in enumerate(prompts)
    ]
    if ratio and len(set(prompts)) == 1:
        with pytest.raises(UserError, match="same prompt"):
            choose_held_out(pairs, ratio)
        return
    apart = choose_held_out(pairs, ratio)
    sides = [
        {number for number, there in zip(prompts, apart) if there == side} for side in (False, True)
    ]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert bool(sides[1]) == (ratio > 0)
    assert apart == choose_held_out(pairs, ratio)


def test_the_share_is_met_and_does_not_depend_on_the_order():
    pairs = [
        Pair((("user", f"question {number // 2}"),), f"a{number}", "b") for number in range(1000)
    ]
    apart = choose_held_out(pairs, 0.1)
    assert sum(apart) == 100
    turned = choose_held_out(pairs[::-1], 0.1)
    assert turned[::-1] == apart
    spaced = [Pair((("user", f" question\t{number // 2}\n"),), "a", "b") for number in range(1000)]
    assert choose_held_out(spaced, 0.1) == apart  # white space makes no other prompt


def test_texts_that_pairs_have_in_common_are_in_memory_once(tmp_path):
    rows = [
        {"prompt": f"prompt {number // 3}", "chosen": "right", "rejected": f"wrong {number % 2}"}
        for number in range(6)
    ]
    write(tmp_path / "a.jsonl", rows)
    pairs = read_pairs([tmp_path / "a.jsonl"]).pairs
    assert pairs[0].messages is pairs[2].messages
    assert pairs[0].messages is not pairs[3].messages
    assert len({id(pair.chosen) for pair in pairs}) == 1
    assert len({id(pair.rejected) for pair in pairs}) == 2
