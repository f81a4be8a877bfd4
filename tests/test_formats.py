"""Formats of preference data, two rows each, as conversations that can be read; files of all kinds.

Nothing of a prompt is lost: what cannot be placed in the conversation is refused.
"""

import csv
import gzip
import json
import sys

import pytest
from conftest import EXAMPLE

from mindrlhf.cli import UserError
from mindrlhf.data import formats, preference, preprocess, sources, summary
from mindrlhf.data.preference import read_pairs


def conversation(pair):
    """A pair as lines of text; line breaks within a text are /."""
    lines = [f"{role}: {text}" for role, text in pair.messages]
    lines += [f"+ {pair.chosen}", f"- {pair.rejected}"]
    return "\n".join(line.replace("\n", " / ") for line in lines)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(tmp_path, rows, kind="auto", **options):
    return read_pairs([write(tmp_path / "pairs.jsonl", rows)], kind, **options)


# Name: (--dataset_type that auto finds, two rows of JSON, the conversations).
FORMATS = {
    "CValues-Comparison": (
        "cvalues",
        """
{"prompt": "How do I start running?", "pos_resp": "Slowly.", "neg_resp": "Don't.", "pos_type": "x"}
{"prompt": "跑步难吗？", "pos_resp": "不难。", "neg_resp": "难。", "system": "Be kind."}
""",
        """
user: How do I start running?
+ Slowly.
- Don't.

system: Be kind.
user: 跑步难吗？
+ 不难。
- 难。
""",
    ),
    "LLaMA-Factory, sharegpt": (
        "dpo",
        """
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
 {"from": "human", "value": "Name a tree"}], "chosen": {"from": "gpt", "value": "Oak"},
 "rejected": {"from": "gpt", "value": "Cat"}, "tools": ""}
{"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
 "rejected": {"from": "gpt", "value": "5"}, "system": "You calculate."}
""",
        """
user: Hi
assistant: Hello
user: Name a tree
+ Oak
- Cat

system: You calculate.
user: 2 + 2?
+ 4
- 5
""",
    ),
    "alpaca": (
        "alpaca",
        """
{"instruction": "Translate to French.", "input": "Good day", "chosen": "Bonjour", "rejected": "Hm",
 "system": "You translate.", "history": [["Translate: yes", "Oui"], ["And no?", "Non"]]}
{"instruction": "Name a tree.", "input": "", "chosen": "Oak", "rejected": "Cat", "history": null}
""",
        """
system: You translate.
user: Translate: yes
assistant: Oui
user: And no?
assistant: Non
user: Translate to French. / Good day
+ Bonjour
- Hm

user: Name a tree.
+ Oak
- Cat
""",
    ),
    "Orca": (
        "orca",
        """
{"system": "You explain.", "question": "Why is the sky blue?", "chosen": "Light scatters.",
 "rejected": "Paint."}
{"system": "", "question": "Name a tree.", "chosen": "Oak", "rejected": "Cat"}
""",
        """
system: You explain.
user: Why is the sky blue?
+ Light scatters.
- Paint.

user: Name a tree.
+ Oak
- Cat
""",
    ),
    "Orca, question in input": (
        "input",
        """
{"system": "You explain.", "input": "Why?", "chosen": "So.", "rejected": "No.", "rating": [9, 1]}
{"system": null, "input": "Name a tree.", "chosen": "Oak", "rejected": "Cat", "rating": [8, 2]}
""",
        """
system: You explain.
user: Why?
+ So.
- No.

user: Name a tree.
+ Oak
- Cat
""",
    ),
    "system beside prompt": (
        "pairs",
        """
{"system": "You explain.", "prompt": "Why?", "chosen": "So.", "rejected": "No."}
{"system": "You explain.", "prompt": [{"role": "system", "content": "You explain."},
 {"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "No."}
""",
        """
system: You explain.
user: Why?
+ So.
- No.

system: You explain.
user: Why?
+ So.
- No.
""",
    ),
    "ms-swift": (
        "swift",
        """
{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
 {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Name a tree"},
 {"role": "assistant", "content": "Oak"}], "rejected_response": "Cat"}
{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
 "rejected_response": "5"}
""",
        """
system: Be kind.
user: Hi
assistant: Hello
user: Name a tree
+ Oak
- Cat

user: 2 + 2?
+ 4
- 5
""",
    ),
    "ms-swift, two conversations": (
        "swift_messages",
        """
{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
 "rejected_messages": [{"role": "user", "content": "2 + 2?"},
 {"role": "assistant", "content": "5"}]}
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
 "rejected_messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bah"}],
 "system": "Be kind."}
""",
        """
user: 2 + 2?
+ 4
- 5

system: Be kind.
user: Hi
+ Hello
- Bah
""",
    ),
    "ms-swift, query": (
        "swift_query",
        """
{"system": "Be kind.", "query": "And no?", "response": "Non", "rejected_response": "Hm",
 "history": [["Translate: yes", "Oui"]]}
{"query": "2 + 2?", "response": "4", "rejected_response": "5"}
""",
        """
system: Be kind.
user: Translate: yes
assistant: Oui
user: And no?
+ Non
- Hm

user: 2 + 2?
+ 4
- 5
""",
    ),
    "OpenRLHF": (
        "pairs",
        """
{"chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
 "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],
 "margin": 1.5}
{"prompt": [{"role": "user", "content": "Hi"}],
 "chosen": [{"role": "assistant", "content": "Hello"}],
 "rejected": [{"role": "assistant", "content": "Bah"}]}
""",
        """
user: 2 + 2?
+ 4
- 5

user: Hi
+ Hello
- Bah
""",
    ),
    "UltraFeedback": (
        "pairs",
        """
{"prompt": "2 + 2?", "prompt_id": "ab1",
 "chosen": [{"content": "2 + 2?", "role": "user"}, {"content": "4", "role": "assistant"}],
 "rejected": [{"content": "2 + 2?", "role": "user"}, {"content": "5", "role": "assistant"}],
 "messages": [{"content": "2 + 2?", "role": "user"}, {"content": "4", "role": "assistant"}],
 "score_chosen": 8.5, "score_rejected": 2.0}
{"prompt": "Hi\\n", "prompt_id": "ab2",
 "chosen": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
 "rejected": [{"content": "Hi", "role": "user"}, {"content": "Bah", "role": "assistant"}],
 "messages": [], "score_chosen": 9.0, "score_rejected": 1.0}
""",
        """
user: 2 + 2?
+ 4
- 5

user: Hi
+ Hello
- Bah
""",
    ),
    "HH-RLHF": (
        "pairs",
        """
{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: A tree?\\n\\nAssistant: Oak\\n\\n.",
 "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: A tree?\\n\\nAssistant: Cat"}
{"chosen": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4",
 "rejected": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 5"}
""",
        """
user: Hi
assistant: Hello
user: A tree?
+ Oak /  / .
- Cat

user: 2 + 2?
+ 4
- 5
""",
    ),
    "HH-RLHF with prompt": (
        "pairs",
        """
{"prompt": "\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Name a tree\\n\\nAssistant:",
 "chosen": " Oak", "rejected": " Cat"}
{"prompt": "\\n\\nHuman: 2 + 2?\\n\\nAssistant:", "chosen": " 4", "rejected": " 5"}
""",
        """
user: Hi
assistant: Hello
user: Name a tree
+ Oak
- Cat

user: 2 + 2?
+ 4
- 5
""",
    ),
    "TRL, strings": (
        "pairs",
        """
{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
{"prompt": "The sun is", "chosen": " hot.", "rejected": " cold."}
""",
        """
user: The sky is
+  blue.
-  green.

user: The sun is
+  hot.
-  cold.
""",
    ),
    "TRL, strings without prompt": (
        "implicit",
        """
{"chosen": "The sky is blue.", "rejected": "The sky is green."}
{"chosen": "The sun is hot.", "rejected": "The sun is cold."}
""",
        """
user: The sky is
+  blue.
-  green.

user: The sun is
+  hot.
-  cold.
""",
    ),
    "TRL, messages": (
        "pairs",
        """
{"prompt": [{"role": "user", "content": "What color is the sky?"}],
 "chosen": [{"role": "assistant", "content": "It is blue."}],
 "rejected": [{"role": "assistant", "content": "It is green."}]}
{"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
 "chosen": [{"role": "assistant", "content": "Hello"}],
 "rejected": [{"role": "assistant", "content": "Bah"}]}
""",
        """
user: What color is the sky?
+ It is blue.
- It is green.

system: Be kind.
user: Hi
+ Hello
- Bah
""",
    ),
    "TRL, messages without prompt": (
        "pairs",
        """
{"chosen": [{"role": "user", "content": "What color is the sky?"},
 {"role": "assistant", "content": "It is blue."}],
 "rejected": [{"role": "user", "content": "What color is the sky?"},
 {"role": "assistant", "content": "It is green."}]}
{"chosen": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
 {"role": "assistant", "content": "Hello"}],
 "rejected": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
 {"role": "assistant", "content": "Bah"}]}
""",
        """
user: What color is the sky?
+ It is blue.
- It is green.

system: Be kind.
user: Hi
+ Hello
- Bah
""",
    ),
}


def rows_of(text):
    """JSON values that stand one after the other, each over one or more lines."""
    return json.loads("[" + text.strip().replace("}\n{", "},{") + "]")


@pytest.mark.parametrize("name", FORMATS)
def test_two_rows_of_each_format_as_conversations(tmp_path, name):
    kind, text, expected = FORMATS[name]
    rows = rows_of(text)
    assert len(rows) == 2
    for given in {kind, "auto"} if kind != "implicit" else {kind}:
        source = read(tmp_path, rows, given)
        assert source.dataset_type == kind
        assert "\n\n".join(map(conversation, source.pairs)) == expected.strip()


def test_each_type_has_rows_here():
    assert {kind for kind, _, _ in FORMATS.values()} == set(formats.FORMATS)


ANSWERS = {"chosen": "good", "rejected": "bad"}
CONVERSATIONS = {
    side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]
    for side, text in ANSWERS.items()
}
REFUSED = [
    ({**ANSWERS, "text": "Q"}, "no 'prompt', but text in 'text'; rename the field"),
    ({**ANSWERS, "a": "Q", "b": ["R"], "n": 1}, "but text in 'a', 'b'; rename"),
    ({"chosen": "I think so", "rejected": "I think not"}, "share no turns"),
    (
        {"chosen": "\n\nHuman: A\n\nAssistant: a", "rejected": "\n\nHuman: B\n\nAssistant: b"},
        "share 0 messages of 2 and 2",
    ),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "'prompt' holds no message"),
    ({"chosen": "Human: Q", "rejected": "Human: Q"}, "'prompt' holds no message"),
    ({"chosen": "Yes\n\nHuman: A\n\nAssistant: a", "rejected": "No"}, "share no turns"),
    ({**CONVERSATIONS, "prompt": "P"}, "the text of 'prompt' is in no message of the pairs row"),
    ({**CONVERSATIONS, "prompt": [{"role": "user", "content": "P"}]}, "the text of 'prompt' is in"),
    ({**CONVERSATIONS, "question": "P"}, "the text of 'question' is in no message of the pairs"),
    ({**ANSWERS, "prompt": "Q", "input": "I"}, "the text of 'input' is in no message"),
    ({**ANSWERS, "prompt": "Add 1 to 15", "input": "5"}, "the text of 'input' is in no message"),
    ({**ANSWERS, "question": "Q", "context": "C"}, "the text of 'context' is in no message"),
    ({"prompt": "Q", "pos_resp": "a", "neg_resp": "b", "instruction": "I"}, "'instruction' is in"),
    ({**ANSWERS, "instruction": "Q", "history": "H"}, "'history' is not a list of messages"),
    ({**ANSWERS, "instruction": "Q", "history": [["H", None]]}, "'history' is NoneType"),
    ({**ANSWERS, "prompt": "Q", "system": ["S"]}, "'system' is list; expected a string"),
    ({**ANSWERS, "prompt": "Q", "tools": '[{"name": "f"}]'}, "'tools' is not empty"),
    ({**ANSWERS, "prompt": "Q", "images": ["a.png"]}, "'images' is not empty"),
    (
        {"messages": [{"role": "user", "content": "Q"}], "rejected_response": "bad"},
        "'messages' does not end with the assistant",
    ),
]


@pytest.mark.parametrize(("row", "why"), REFUSED)
def test_a_row_whose_prompt_would_be_lost_is_refused(tmp_path, row, why):
    with pytest.raises(UserError, match=f"pairs.jsonl:1: .*{why}") as caught:
        read(tmp_path, [row])
    assert "\n" not in str(caught.value)


def test_a_later_row_with_its_prompt_elsewhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=r":2: no 'prompt', but text in 'instruction'"):
        read(tmp_path, [{**ANSWERS, "prompt": "Q"}, {**ANSWERS, "instruction": "Q"}])


def test_the_same_prompt_in_two_fields_stands_once(tmp_path):
    row = {**ANSWERS, "prompt": "Q  R", "question": "Q R\n", "history": [["A", "B"]]}
    assert conversation(read(tmp_path, [row]).pairs[0]) == (
        "user: A\nassistant: B\nuser: Q  R\n+ good\n- bad"
    )


def test_a_question_beside_whole_conversations_is_their_prompt(tmp_path):
    source = read(tmp_path, [{**CONVERSATIONS, "question": "Q"}])
    assert source.dataset_type == "pairs"
    assert conversation(source.pairs[0]) == "user: Q\n+ good\n- bad"


@pytest.mark.parametrize("row", [{"prompt": "", "instruction": "Q"}, {"prompt": "Q", "input": ""}])
def test_an_empty_field_beside_the_prompt_does_not_matter(tmp_path, row):
    pair = read(tmp_path, [{**ANSWERS, **row}]).pairs[0]
    assert conversation(pair) == "user: Q\n+ good\n- bad"


def test_deeply_nested_fields_do_not_matter(tmp_path):
    nested = '{"prompt": "Q", "chosen": "a", "rejected": "b", "x": ' + "[" * 900 + "]" * 900 + "}"
    (tmp_path / "pairs.jsonl").write_text(nested)
    assert len(read_pairs([tmp_path / "pairs.jsonl"]).pairs) == 1


def test_empty_prompts_are_counted(tmp_path):
    rows = [
        {"instruction": "", "input": "", **ANSWERS},
        {"instruction": " ", "system": "S", **ANSWERS},
        {"instruction": "Q", **ANSWERS},
    ]
    source = read(tmp_path, rows)
    path = tmp_path / "pairs.jsonl"
    assert source.noted[preference.EMPTY_PROMPT] == [f"{path}:1", f"{path}:2"]
    assert len(source.pairs) == 3


def test_the_summary_lists_ignored_fields_and_shows_a_pair(tmp_path):
    row = {"prompt": "Q\x1b[2J", "system": "S", **ANSWERS, "score": 1, "tags": []}
    source = read(tmp_path, [{**row, "a\x1b": "x" * 99}, row, {**row, "chosen": "long " * 999}])
    assert source.ignored == {"score": 3, "a\x1b": 1}
    assert summary.source_lines(source) == [
        r"  ignored    score in 3 rows, a\x1b in 1 rows",
        f"  a pair     {tmp_path}/pairs.jsonl:1, as rendered",
        r"    prompt   [gMASK]<sop><|system|>\nS<|user|>\nQ\x1b[2J<|assistant|>",
        r"    chosen   \ngood<|user|>",
        r"    rejected \nbad<|user|>",
    ]
    assert max(map(len, summary.pair_lines(source.pairs[2]))) < 250


def test_preprocessing_prints_what_it_read(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "Q", "id": 7, **ANSWERS}])
    preprocess.read_source(preprocess.Options([str(path)], "out.mindrecord"))
    assert capsys.readouterr().out.splitlines() == [
        "1 pairs in 1 file(s), --dataset_type pairs (detected from its fields)",
        "  ignored    id in 1 rows",
        f"  a pair     {path}:1, as rendered",
        r"    prompt   [gMASK]<sop><|user|>\nQ<|assistant|>",
        r"    chosen   \ngood<|user|>",
        r"    rejected \nbad<|user|>",
    ]


@pytest.mark.parametrize("tutorial", ["README.md", "README_CN.md"])
def test_the_tutorial_has_every_type(tutorial):
    lines = (EXAMPLE / tutorial).read_text(encoding="utf-8").splitlines()
    for kind, form in formats.FORMATS.items():
        row = next(line for line in lines if line.startswith(f"| {kind} |"))
        assert all(f"`{name}`" in row for name in (*form.fields, *form.optional))


# Files that are not JSON

TABLE = [
    {"instruction": 'Say "hi",\ntwice', "system": "S", "chosen": "hi hi", "rejected": "不"},
    {"instruction": "Name a tree", "system": "", "chosen": "Oak", "rejected": "Cat"},
]
EXPECTED = """system: S
user: Say "hi", / twice
+ hi hi
- 不

user: Name a tree
+ Oak
- Cat"""


def conversations(path):
    return "\n\n".join(map(conversation, read_pairs([path]).pairs))


def write_csv(path, rows, opened=open):
    with opened(path, "wt", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def test_csv(tmp_path):
    path = write_csv(tmp_path / "pairs.csv", TABLE)
    assert conversations(path) == EXPECTED
    places = [pair.place for pair in read_pairs([path]).pairs]
    assert places == [f"{path}:2", f"{path}:4"]  # where a row begins
    assert conversations(write_csv(tmp_path / "pairs.csv.gz", TABLE, gzip.open)) == EXPECTED
    cells = {side: json.dumps(messages) for side, messages in CONVERSATIONS.items()}
    assert conversations(write_csv(path, [cells])) == "user: Q\n+ good\n- bad"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"prompt,chosen,prompt\n", "names a column twice"),
        (b"prompt,chosen,rejected\nQ,a,b\nQ,a\n", ":3: 2 cells, but the first line names 3"),
        (b"prompt,chosen,rejected\nQ,a,\xff\n", "not UTF-8"),
        (b'prompt,chosen,rejected\nQ,a,b\n"Q,a\n', ":3: not CSV"),
        (b"chosen,rejected\n\"[{'role': 'user'}]\",b\n", "'chosen' holds messages that are not"),
        (b"prompt,chosen\nQ,a\n", "this row has: prompt, chosen"),
    ],
)
def test_faults_of_csv_are_one_line(tmp_path, text, why):
    path = tmp_path / "pairs.csv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"pairs.csv.*{why}") as caught:
        read_pairs([path])
    assert "\n" not in str(caught.value)


def save_to_disk(folder, rows):
    """A folder as datasets' save_to_disk writes it, in two files."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, row in zip(names, rows):
        table = arrow.Table.from_pylist([row])
        with arrow.ipc.new_stream(str(folder / name), table.schema) as file:
            file.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    parquet.write_table(arrow.Table.from_pylist(TABLE), path, row_group_size=1)
    assert conversations(tmp_path) == EXPECTED
    assert [pair.place for pair in read_pairs([path]).pairs] == [f"{path}:1", f"{path}:2"]
    parquet.write_table(
        arrow.Table.from_pylist([CONVERSATIONS, {**CONVERSATIONS, "prompt": "Q"}]), path
    )
    assert conversations(path) == "\n\n".join(["user: Q\n+ good\n- bad"] * 2)
    twice = arrow.table([["Q"], ["a"], ["b"], ["c"]], ["prompt", "chosen", "rejected", "chosen"])
    parquet.write_table(twice, path)
    with pytest.raises(UserError, match=r"pairs.parquet: names a column twice"):
        read_pairs([path])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"pairs.parquet: not a complete .parquet file") as caught:
        read_pairs([path])
    assert "\n" not in str(caught.value)


def test_folders_of_save_to_disk(tmp_path):
    assert conversations(save_to_disk(tmp_path / "one", TABLE)) == EXPECTED
    save_to_disk(tmp_path / "dict" / "train", TABLE)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert conversations(tmp_path / "dict") == EXPECTED
    save_to_disk(tmp_path / "dict" / "test", TABLE)
    with pytest.raises(UserError, match="holds the splits test, train; name the folder of one"):
        read_pairs([tmp_path / "dict"])
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json: does not list the files"):
        read_pairs([tmp_path / "one"])


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path / "saved")
    assert conversations(tmp_path / "saved") == EXPECTED


def test_zstd(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "pairs.jsonl.zst"
    with arrow.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in TABLE).encode())
    assert conversations(path) == EXPECTED
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"pairs.jsonl.zst: cannot be read \(.*\)") as caught:
        read_pairs([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl.zst"])
def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow, which is not installed; run pip install"):
        list(sources.read_file_rows(path))
