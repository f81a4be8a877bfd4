"""run_dpo.py in run_mode predict: a message, a file of prompts, a comparison, a conversation."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import mindspore as ms
import pytest
import run_dpo
from conftest import EXAMPLE, assert_one_error, load_model, run_script

from mindrlhf import cli, config, locks
from mindrlhf.cli import UserError
from mindrlhf.data import formats
from mindrlhf.inference import answer_file, chat, compare, generate
from mindrlhf.inference.engine import Engine
from mindrlhf.inference.sampling import Sampling
from mindrlhf.markdown import fenced
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

SEQ = 96
RUN_DPO = EXAMPLE / "run_dpo.py"


@pytest.fixture(scope="module")
def yaml(golden):
    path = golden.folder / "short.yaml"
    path.write_text(
        f"base_config: {golden.predict}\nmodel: {{model_config: {{seq_length: {SEQ}, "
        "max_decode_length: 16, batch_size: 4}}\n"
    )
    return path


@pytest.fixture(scope="module")
def options(golden, yaml):
    return [
        "--config",
        str(yaml),
        "--load_checkpoint",
        str(golden.checkpoint),
        "--vocab_file",
        str(golden.tokenizer),
    ]


@pytest.fixture(scope="module")
def network(golden):
    return load_model(golden, "predict", {"model.model_config.seq_length": SEQ})


@pytest.fixture(scope="module")
def settings(yaml):
    return config.load_settings(yaml, run_mode="predict")


@pytest.fixture
def loaded(network, settings, monkeypatch):
    """Commands of this process take the network that is loaded."""

    def load_engine(model, batch_size=None, most=None):
        return Engine(network, model.tokenizer, model.settings, batch_size, most)

    for module in (answer_file, compare, generate):
        monkeypatch.setattr(module, "load_engine", load_engine)


@pytest.fixture
def prompts(tmp_path, texts):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n\n" for prompt, _ in texts), encoding="utf-8")
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_is_answered_on_stdout_in_its_order(loaded, options, prompts, texts, capsys):
    run_dpo.main([*options, "--predict_file", str(prompts)])
    found = lines(capsys.readouterr().out)
    assert [row["line"] for row in found] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [row["answer"] for row in found] == [answer for _, answer in texts]
    assert found[0]["messages"] == [{"role": "user", "content": texts[0][0]}]
    assert {row["finish_reason"] for row in found} == {"length"}
    assert {row["tokens"] for row in found} == {16}


def test_one_message_is_answered_as_before(loaded, options, texts, capsys):
    run_dpo.main([*options, "--predict_data", texts[1][0]])
    assert capsys.readouterr().out == texts[1][1] + "\n"
    sampled = [*options, "--predict_data", texts[1][0], "--num_answers", "2", "--top_p", "0.99"]
    run_dpo.main(sampled)
    first = capsys.readouterr().out
    assert first.startswith("[1] ")
    assert "\n[2] " in first
    run_dpo.main(sampled)
    assert capsys.readouterr().out == first
    run_dpo.main([*sampled, "--seed", "1"])
    assert capsys.readouterr().out != first


def test_rows_of_json_with_prompts_messages_and_pairs(loaded, options, tmp_path, texts, capsys):
    text, answer = texts[1]
    source = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": text},
        {"messages": [{"role": "user", "content": text}], "id": 7},
        {"prompt": text, "pos_resp": "a", "neg_resp": "b"},
        {"prompt": text, "system": "kind", "history": [["<|user|>", "b"]]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dpo.main([*options, "--predict_file", str(source)])
    found = lines(capsys.readouterr().out)
    assert [row["answer"] for row in found[:3]] == [answer] * 3
    assert [message["role"] for message in found[3]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    run_dpo.main([*options, "--predict_file", str(source), "--system", "kind"])
    again = lines(capsys.readouterr().out)
    assert again[0]["messages"][0] == {"role": "system", "content": "kind"}
    assert again[3] == found[3]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": "x"}, "no prompt; a row has prompt, messages"),
        ([1], "no prompt.*list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with the assistant"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "role 'boss'"),
        ({"prompt": "x", "instruction": "y"}, "'instruction' is in no message"),
        ({"prompt": "x", "tools": ["y"]}, "'tools' is not empty"),
        ({"prompt": 5}, "'prompt' is not a list of messages"),
    ],
)
def test_rows_that_are_no_prompts(row, part):
    with pytest.raises(ValueError, match=part):
        formats.parse_prompt(row)


def test_dialogues_are_turned_into_messages():
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}
    assert formats.parse_prompt(row) == (("user", "a"), ("assistant", "b"), ("user", "c"))


def test_files_that_cannot_be_answered(options, tmp_path):
    source = tmp_path / "p.txt"
    for content, part in (
        (b"\n \n", "p.txt: holds no prompt"),
        (b"ok\n\xff\n", "p.txt:2: not UTF-8"),
        (b"ok\n" + b"x" * 300, "p.txt:2: the prompt is .* fills seq_length 96; shorten it"),
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=part):
            run_dpo.main([*options, "--predict_file", str(source)])
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match="p.jsonl:2: not JSON"):
        run_dpo.main([*options, "--predict_file", str(source)])


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--predict_data", "a", "--chat"], "--predict_data and --chat: give one"),
        (["--chat", "--num_answers", "2"], "--chat takes no --num_answers"),
        (["--predict_data", "a", "--output", "x"], "--predict_data takes no --output"),
        (["--predict_data", "a", "--num_answers", "2"], "add --temperature 1"),
        (["--predict_data", "a", "--top_p", "1.5"], "a number above 0, up to 1, got '1.5'"),
        (["--predict_data", "a", "--temperature", "nan"], "got 'nan'"),
        (["--predict_data", "a", "--compare_with", "base"], "needs --adapter_checkpoint"),
        (["--predict_data", "a", "--compare_with", "none.ckpt"], "none.ckpt: no such file"),
    ],
)
def test_options_that_do_not_go_together(options, more, part):
    with pytest.raises(UserError, match=part):
        run_dpo.main([*options, *more])


def test_training_takes_no_option_of_prediction(golden):
    for option, value in (("--batch_size", "8"), ("--seed", "0"), ("--predict_data", "a")):
        with pytest.raises(UserError, match=f"{option} is for run_mode predict"):
            run_dpo.main(["--config", str(golden.finetune), option, value])


# --output: resumable


def test_a_killed_run_goes_on_and_ends_with_the_same_file(loaded, options, tmp_path, texts):
    source, output = tmp_path / "many.txt", tmp_path / "answers.jsonl"
    source.write_text("".join(f"{prompt}\n" for prompt, _ in texts) * 6, encoding="utf-8")
    task = [*options, "--predict_file", str(source), "--temperature", "1"]
    process = subprocess.Popen(
        [sys.executable, str(RUN_DPO), *task, "--output", str(output), "--batch_size", "1"]
    )
    part = tmp_path / "answers.jsonl.part"
    deadline = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = part.read_bytes()
    assert done.count(b"\n") < 48
    part.write_bytes(done + b'{"line": 1')  # as if it was killed within a line
    run_dpo.main([*task, "--output", str(output)])
    assert not part.exists()
    found = output.read_bytes()
    assert found.startswith(done[: done.rindex(b"\n") + 1])
    run_dpo.main([*task, "--output", str(tmp_path / "at_once.jsonl")])
    assert (tmp_path / "at_once.jsonl").read_bytes() == found


def test_answers_are_replaced_only_if_told(loaded, options, prompts, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    task = [*options, "--predict_file", str(prompts), "--output", str(output)]
    run_dpo.main(task)
    before = output.read_bytes()
    run_dpo.main(task)
    assert "has all 8 answers already" in capsys.readouterr().out
    with pytest.raises(UserError, match="max_new_tokens was 16, is 3; replace .* --overwrite"):
        run_dpo.main([*task, "--max_new_tokens", "3"])
    assert output.read_bytes() == before
    run_dpo.main([*task, "--max_new_tokens", "3", "--overwrite"])
    short = output.read_bytes()
    assert {row["tokens"] for row in lines(short.decode())} == {3}
    output.write_bytes(short[:-1])  # someone has cut it
    with pytest.raises(UserError, match="it has 7 lines of 8"):
        run_dpo.main([*task, "--max_new_tokens", "3"])
    output.rename(f"{output}.part")  # killed within the last line
    run_dpo.main([*task, "--max_new_tokens", "3"])
    assert output.read_bytes() == short
    output.rename(f"{output}.part")  # killed after the last line
    run_dpo.main([*task, "--max_new_tokens", "3"])
    assert output.read_bytes() == short


def test_no_other_file_is_written_over(loaded, options, prompts, tmp_path):
    task = [*options, "--predict_file", str(prompts), "--overwrite", "--output"]
    with pytest.raises(UserError, match="is the same file as"):
        run_dpo.main([*task, str(prompts)])
    other = tmp_path / "mine.jsonl"
    other.write_text("mine\n")
    with pytest.raises(UserError, match="exists and is not a file of answers"):
        run_dpo.main([*task, str(other)])
    assert other.read_text() == "mine\n"


@pytest.mark.parametrize("more", [[], ["--compare_with", "OTHER"]])
def test_one_process_writes_a_file(loaded, options, other, prompts, tmp_path, more):
    """Another one, which would replace it, does not even touch what the first has written."""
    output, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    part.write_text("{}\n")
    task = [*options, "--predict_file", str(prompts), "--overwrite", "--output", str(output)]
    held = output.with_suffix("") if more else output
    with locks.hold(held), pytest.raises(UserError, match=r"another run is writing it \(process"):
        run_dpo.main([*task, *(str(other) if each == "OTHER" else each for each in more)])
    assert part.read_text() == "{}\n"


def test_a_lone_surrogate_is_written_as_json():
    line = answer_file.json_line({"a": "\ud800你"})
    assert json.loads(line) == {"a": "\ud800你"}
    assert "你".encode() in line


# --compare_with


@pytest.fixture(scope="module")
def other(golden, tmp_path_factory):
    """A checkpoint that answers otherwise."""
    path = tmp_path_factory.mktemp("other") / "other.ckpt"
    model = load_model(golden, "predict", {"model.model_config.seq_length": SEQ})
    weight = model.transformer.output_layer.weight
    weight.set_data(ms.Tensor(-weight.asnumpy()))
    ms.save_checkpoint(model, str(path))
    return path


def test_both_models_answer(options, prompts, other, texts, tmp_path, capsys):
    """In this process, without the shared network: its weights are replaced."""
    stem = tmp_path / "both"
    task = [*options, "--predict_file", str(prompts), "--compare_with", str(other)]
    run_dpo.main([*task, "--output", f"{stem}.md"])
    assert "8 of 8 answers differ" in capsys.readouterr().out
    found = lines((tmp_path / "both.jsonl").read_text())
    assert [row["answer"] for row in found] == [answer for _, answer in texts]
    alone = [*options, "--predict_file", str(prompts), "--load_checkpoint", str(other)]
    run_dpo.main(alone)
    wanted = [row["answer"] for row in lines(capsys.readouterr().out)]
    assert [row["other_answer"] for row in found] == wanted
    markdown = (tmp_path / "both.md").read_bytes().decode()
    assert markdown.startswith(compare.TITLE)
    assert all(fenced(text) in markdown for pair in texts for text in pair)
    with pytest.raises(UserError, match="replace it with --overwrite"):
        run_dpo.main([*task, "--output", str(stem)])


def test_columns_count_cells():
    assert compare.cells("a跑\u0301🙂") == 5
    assert compare.wrap_cells("跑步跑步跑", 5) == ["跑步", "跑步", "跑"]
    assert compare.wrap_cells("one two three", 8) == ["one two", "three"]
    assert compare.wrap_cells("a\x1b[31m\n", 20) == [r"a\x1b[31m", ""]


# --chat


@pytest.fixture
def talk(network, settings, golden):
    tokenizer = Glm4Tokenizer(golden.tokenizer)
    return chat.Conversation(Engine(network, tokenizer, settings), Sampling(16), None)


def test_a_conversation_has_history_and_commands(talk, texts, tmp_path):
    assert "".join(talk.answer(texts[1][0])) == texts[1][1]
    assert talk.messages == [("user", texts[1][0]), ("assistant", texts[1][1])]
    first = "".join(talk.answer(texts[1][0]))
    assert first != texts[1][1]  # it has seen the first turn
    talk.command(f"/save {tmp_path / 'c.json'}")
    saved = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    with pytest.raises(UserError, match="exists; give the name of a new file"):
        talk.command(f"/save {tmp_path / 'c.json'}")
    with pytest.raises(UserError, match="give another name"):  # the conversation goes on
        talk.command(f"/save {tmp_path / ('x' * 300)}")
    talk.command("/reset")
    assert "".join(talk.answer(texts[1][0])) == texts[1][1]
    talk.command("/reset")
    talk.command("/system kind")
    assert "".join(talk.answer(texts[1][0])) != texts[1][1]
    assert talk.all_messages[0] == ("system", "kind")
    with pytest.raises(UserError, match="/bye is no command; there are /reset"):
        talk.command("/bye")
    talk.command("/quit")
    assert talk.is_over


def test_a_conversation_that_is_too_long_stays_as_it_was(talk, texts):
    list(talk.answer(texts[1][0]))
    before = list(talk.messages)
    with pytest.raises(UserError, match="the conversation is .* seq_length 96; /reset it"):
        list(talk.answer("x" * 300))
    assert talk.messages == before


def test_chat_from_a_pipe(options, texts):
    result = subprocess.run(
        [sys.executable, str(RUN_DPO), *options, "--chat"],
        input=f"{texts[1][0]}\n/nope\n/quit\nnever read\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        cli.printable(texts[1][1]),
        "error: /nope is no command; there are /reset, /system, /save, /quit, /help",
    ]


def test_ctrl_c_stops_an_answer_and_not_the_program(options, tmp_path, texts):
    """In a terminal, with prompt_toolkit."""
    more = ["--max_new_tokens", "5000", "--chat"]
    longer = tmp_path / "long.yaml"
    longer.write_text(f"base_config: {options[1]}\nmodel: {{model_config: {{seq_length: 2048}}}}\n")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(RUN_DPO), *options, "--config", str(longer), *more],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
    )
    os.close(follower)
    seen = bytearray()

    def wait_for(text, start=0):
        deadline = time.monotonic() + 60
        while text not in seen[start:]:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([leader], [], [], 0.1)[0]:
                seen.extend(os.read(leader, 65536))
        return len(seen)

    try:
        place = wait_for(b"Ctrl-C stops an answer")
        os.write(leader, f"{texts[1][0]}\r".encode())
        wait_for(texts[1][1][1:2].encode(), place)  # of the answer; no echo has it
        os.write(leader, b"\x03")
        wait_for(b"[stopped]")
        os.write(leader, b"/quit\r")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(leader)


def test_a_missing_editor_is_one_line(options):
    code = (
        "import sys; sys.modules['prompt_toolkit'] = None; sys.stdin.isatty = lambda: True; "
        "sys.path.insert(0, sys.argv.pop(1)); import run_dpo; "
        "from mindrlhf import cli; cli.run_command(run_dpo.main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLE), *options, "--chat"],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.PIPE,
    )
    assert_one_error(result, "needs prompt_toolkit", "pip install -r requirements-serve.txt")


def test_the_command_itself_answers_a_file(options, prompts, texts):
    """As a user runs it: stdout has the answers only."""
    result = run_script(RUN_DPO, *options, "--predict_file", prompts, "--batch_size", 3)
    assert result.returncode == 0
    assert result.stderr == ""
    assert [row["answer"] for row in lines(result.stdout)] == [answer for _, answer in texts]
