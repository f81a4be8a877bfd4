"""The card of a run: what it says, that every change is noticed, and that text stays text."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import (
    EXAMPLE,
    ROOT,
    RUN_DPO,
    arguments,
    assert_one_error,
    records,
    run_script,
    training_yaml,
)
from test_transform_checkpoint import run as merge
from test_transform_checkpoint import whole, write, write_shards

import convert_weight
from mindrlhf.card import add, claims, evidence, model_card, phrases, record, render, verify
from mindrlhf.card.__main__ import main as card_command
from mindrlhf.cli import UserError
from mindrlhf.inference import score_record
from mindrlhf.inference.answer_file import json_line
from mindrlhf.inference.compare import AnswerPair, describe_pair
from mindrlhf.inference.prompts import Prompt
from mindrlhf.inference.score_record import Accuracy, Mean, Score, Slice
from mindrlhf.json_files import SEAL, read_json, write_json
from mindrlhf.markdown import code_span, fenced
from mindrlhf.models.glm4 import sidecar

HOSTILE = (
    "a`|b\n# no title <script>alert(1)</script> ``` [x](javascript:y) \x1b[31m \u202e| `` {id}"
)


def train(place, max_steps, *more):
    """Train in a folder whose name has a space, so that its command needs quotes."""
    config = training_yaml(place.folder, "carded")
    config.write_text(config.read_text() + "seed: 7\n")
    config.write_text(config.read_text().replace("epochs: 2", f"epochs: 2, max_steps: {max_steps}"))
    words = arguments(
        place, config, place.output, more=["--eval_dataset", place.data, *map(str, more)]
    )
    result = run_script(RUN_DPO, *words)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result


@pytest.fixture(scope="module")
def place(golden, tmp_path_factory):
    """A run stopped after 3 of 6 steps and resumed, its result merged, and everything in its card.

    All files are copies, because tests damage them.
    """
    folder = tmp_path_factory.mktemp("card")
    for path in (*golden.folder.glob("golden.*"), golden.tokenizer):
        shutil.copy(path, folder)
    found = SimpleNamespace(
        folder=folder, output=folder / "a run", card=folder / "a run/card",
        checkpoint=folder / "golden.ckpt", data=folder / "golden.mindrecord",
        tokenizer=folder / "tokenizer.model", merged=folder / "merged/merged.ckpt",
        score=folder / "score/score.json", answers=folder / "both.jsonl",
    )  # fmt: skip
    train(found, 3)
    found.first = record.read_card(found.card)
    found.screen = train(found, 6, "--resume", "auto").stdout
    found.trained = record.read_card(found.card)
    merging = run_script(
        ROOT / "transform_checkpoint.py",
        f"--src_checkpoint={found.output / 'checkpoint_network'}",
        f"--dst_checkpoint={found.merged.parent}",
    )
    assert merging.returncode == 0, merging.stderr
    fingerprint = sidecar.read_sidecar(sidecar.path_beside(found.merged)).about["fingerprint"]
    write_a_score(found.score, fingerprint, found.data)
    write_answers(found.answers)
    add.main([str(found.card), "--checkpoint", str(found.merged), "--score",
              str(found.score.parent), "--answers", str(found.answers)])  # fmt: skip
    return found


def write_a_score(path, fingerprint, data="held_out.mindrecord", value=0.75):
    path.parent.mkdir(parents=True, exist_ok=True)
    accuracy, margin = Accuracy(value, 0.5, 0.9, 8, 5, 1), Mean(1.5, 0.25)
    score_record.write_score(
        Score(
            kind=score_record.PREFERENCES, run="0" * 64, data={"file": str(data)},
            model={"file": "merged.ckpt", "fingerprint": fingerprint, "adapters": None},
            reference=None, settings={"beta": 0.1}, versions={}, accuracy=accuracy, margin=margin,
            metrics={}, slices={"type": [Slice("拒绝&正向建议 - 风险回复", accuracy, margin)]},
        ),
        path,
    )  # fmt: skip


def write_answers(path):
    def pair(line, prompt, own, other):
        answers = [
            SimpleNamespace(text=text, number=0, finish_reason="stop") for text in (own, other)
        ]
        return AnswerPair(Prompt(line, (("user", prompt),), []), *answers)

    pairs = [pair(1, "怎么开始学跑步？", "每天一点。", "嗯"), pair(2, "x", HOSTILE, HOSTILE)]
    path.write_bytes(b"".join(json_line(describe_pair(each, None)) for each in pairs))


def read(place, name="README.md"):
    return (place.card / name).read_text(encoding="utf-8")


def verified(place, *more):
    """Exit status of verification, and its lines: claim -> state."""
    lines = {}
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr("mindrlhf.cli.say", found.append)
        try:
            verify.main([str(place.card), *map(str, more)])
        except SystemExit as end:
            status = end.code
    pattern = "|".join((claims.HOLDS, claims.DIFFERS, claims.UNKNOWN))
    for line in found[:-1]:
        state, rest = re.match(rf"({pattern})\s+(.*)", line, re.S).groups()
        lines[rest] = state
    return status, lines


# what a card says


def test_training_writes_it_from_the_records_of_the_run(place):
    card, first = place.trained, records(place.output)[0]
    assert f"card: {place.card / 'README.md'}" in place.screen
    assert card["run"] == {
        "id": read_json(place.output / "run.json")["id"],
        "config": str(place.folder / "carded.yaml"),
        "workers": 1,
    }
    assert card["step_0"]["dpo_loss"] == first["dpo_loss"]
    assert card["base"]["fingerprint"] == card["base"]["fingerprint"].lower()
    made = read_json(f"{place.data}.json")
    assert card["base"]["fingerprint"] == made["checkpoint"]["fingerprint"]
    assert card["tokenizer"]["sha256"] == made["tokenizer"]["sha256"]
    assert card["data"]["train"]["pairs"] == made["pairs"]["written"]
    assert card["data"]["held_out"]["xxh3_128"] == made["xxh3_128"]
    assert card["data"]["train"]["template"] == made["template"]
    assert set(card["versions"]) >= {"python", "mindspore", "mindformers", "code"}
    assert not {"score", "answers"} & set(card)


def test_a_resumed_run_has_one_card_of_all_its_steps(place):
    assert (place.first["metrics"]["steps"], place.trained["metrics"]["steps"]) == (3, 6)
    metrics, steps = place.trained["metrics"], records(place.output)
    assert metrics["first_step"] == 1
    assert metrics["pairs"] == sum(step["pairs"] for step in steps) == 16
    assert metrics["tokens"] == steps[-1]["num_tokens"]
    assert metrics["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
    evaluation = place.trained["evaluation"]
    assert [evaluation[when]["step"] for when in ("before", "after")] == [0, 6]
    assert place.first["run"]["id"] == place.trained["run"]["id"]


def test_weights_that_another_worker_saved_earlier_do_not_count(place, tmp_path):
    """A run that was extended still has its former weights until each worker has saved again."""
    shutil.copytree(place.output / "checkpoint_network", tmp_path / "checkpoint_network")
    saved = read_json(tmp_path / "checkpoint_network/rank_0/step.json")
    shutil.copytree(tmp_path / "checkpoint_network/rank_0", tmp_path / "checkpoint_network/rank_1")
    write_json(tmp_path / "checkpoint_network/rank_1/step.json", {**saved, "step": 3})
    assert list(evidence.read_shards(tmp_path, saved, 3, patience=0)) == ["rank_0"]
    assert saved["step"] == 6


def test_its_commands_are_those_that_were_typed(place):
    own = [shlex.split(command) for command in place.trained["commands"]]
    own = [words for words in own if words[1].endswith("run_dpo.py")]
    assert len(own) == 2  # of the start, and of the resumption
    for words in own:
        assert words[0] == "python"
        assert words[words.index("--output_dir") + 1] == str(place.output)
    assert own[1][-2:] == ["--resume", "auto"]
    assert "'" in next(line for line in read(place).splitlines() if "run_dpo.py" in line)


def test_it_names_the_settings_that_differ_from_the_nearest_yaml(place):
    settings = place.trained["settings"]
    assert settings["like"] == "finetune_glm4_tiny.yaml"
    assert settings["values"]["model.model_config.num_layers"] == 3
    assert settings["values"]["seed"] == 7
    assert settings["values"]["dpo.sft_weight"] == 0.0
    assert "model.model_config.rope_ratio" not in settings["values"]


@pytest.mark.parametrize("name", record.DOCUMENTS)
def test_the_documents_say_it(place, name):
    text = read(place, name)
    card = record.read_card(place.card)
    merged = card["result"]["merged"]["fingerprint"]
    for part in (merged, card["base"]["fingerprint"], card["tokenizer"]["sha256"],
                 card["data"]["train"]["xxh3_128"]["rows"], "0.69314", "75.0%", "50.0%",
                 "每天一点。", "finetune_glm4_tiny.yaml", "transform_checkpoint.py",
                 "](curves.png)", "`rewards/accuracies`", "拒绝&正向建议"):  # fmt: skip
        assert part in text, part
    assert (place.card / "curves.png").read_bytes() == (place.output / "curves.png").read_bytes()


def test_sections_without_data_are_left_out(place):
    card = {name: place.trained[name] for name in record.NEEDED}
    for language, title in (("en", "## Check before"), ("zh", "## 首次更新前")):
        assert title in render.render_card(place.trained, language)
        text = render.render_card(card, language)
        assert title not in text
        assert text.count("\n## ") == 5


def test_both_languages_have_all_phrases_and_the_same_values():
    for key, phrase in phrases.PHRASES.items():
        names = [sorted(re.findall(r"\{(\w+)\}", text)) for text in phrase]
        assert names[0] == names[1], key
    used = (ROOT / "mindrlhf/card/render.py").read_text()
    for key in phrases.PHRASES:
        stem = key.split("_")[0] + "_{"
        named = re.search(rf"""["']{key}["']""", used) or stem in used
        assert named or key in ("train", "held_out"), key


# verification


def test_everything_holds(place):
    status, lines = verified(place)
    assert status == 0
    assert set(lines.values()) == {claims.HOLDS}, lines
    assert len(lines) >= 18


FLIPS = {  # file -> claim that notices it
    "golden.ckpt": "base weights", "golden.mindrecord": "training data: content",
    "golden.mindrecord.db": "held-out data: content",
    "golden.mindrecord.json": "training data: counts", "tokenizer.model": "tokenizer",
    "merged/merged.ckpt": "merged result", "score/score.json": "score",
    "both.jsonl": "answers", "a run/metrics.jsonl": "training metrics",
    "a run/run.json": "run and settings", "golden.ckpt.json": "base weights: config",
    "a run/checkpoint_network/rank_0/glm4_dpo-network.ckpt": "result, rank_0",
    "a run/card/card.json": "card.json", "a run/card/README.md": "README.md",
    "a run/card/README_CN.md": "README_CN.md", "a run/card/curves.png": "curves.png",
}  # fmt: skip


@pytest.mark.parametrize("name", FLIPS)
def test_one_flipped_bit_is_noticed_in_each_kind_of_file(place, name):
    path = place.folder / name
    mode, good = path.stat().st_mode, path.read_bytes()
    path.chmod(0o600)
    rng = random.Random(name)
    try:
        for _ in range(3):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1  # the lowest bit: text stays text
            path.write_bytes(bad)
            try:
                status, lines = verified(place)
            except UserError:  # card.json that is no JSON any more: exit status 2
                assert name.endswith("card.json")
                continue
            assert status == 1
            found = [line for line, state in lines.items() if state == claims.DIFFERS]
            assert any(line.startswith(FLIPS[name]) for line in found), found
    finally:
        path.write_bytes(good)
        path.chmod(mode)


def numbers_in(value, path=()):
    """Paths of all numbers of a card."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from numbers_in(each, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def test_each_number_that_is_edited_in_card_json_is_noticed(place):
    """With the old seal the file is not as it was written; with a new one, records still differ."""
    path = place.card / "card.json"
    good = path.read_bytes()
    try:
        for where in numbers_in(json.loads(good)):
            if where[0] == "format":
                continue
            content = json.loads(good)
            target = content
            for key in where[:-1]:
                target = target[key]
            target[where[-1]] += 1
            write_json(path, content)
            (seal, *_) = claims.find_claims(content, place.card, claims.Places())
            assert seal.check().state == claims.DIFFERS
            content.pop(SEAL)
            write_json(path, content, sealed=True)
            card = record.read_card(place.card, sealed=False)
            differing = {
                claim.name
                for claim in claims.find_claims(card, place.card, claims.Places())
                if "fingerprint" not in claim.name and claim.check().state == claims.DIFFERS
            }
            assert "card.json" not in differing
            assert differing - {"README.md", "README_CN.md"}, where
    finally:
        path.write_bytes(good)


def test_both_values_are_printed(place, capsys):
    path = place.card / "card.json"
    good = path.read_bytes()
    content = read_json(path)
    content["metrics"]["pairs"] = 17
    try:
        write_json(path, content, sealed=True)
        with pytest.raises(SystemExit) as end:
            card_command(["verify", str(place.card)])
    finally:
        path.write_bytes(good)
    assert end.value.code == 1
    assert "pairs: the card says 17, recomputed: 16" in capsys.readouterr().out


def test_files_that_have_moved_can_be_named_and_others_cannot_be_checked(place, tmp_path):
    away = {"golden.ckpt": "base", "tokenizer.model": "tokenizer", "both.jsonl": "answers",
            "merged/merged.ckpt": "checkpoint", "golden.ckpt.json": None}  # fmt: skip
    for name in away:
        (place.folder / name).rename(tmp_path / Path(name).name)
    try:
        status, lines = verified(place)
        assert status == 0
        unknown = [line for line, state in lines.items() if state == claims.UNKNOWN]
        assert len(unknown) == len(away)
        options = {name: option for name, option in away.items() if option}
        assert all(f"name it with --{option}" in "".join(unknown) for option in options.values())
        more = [
            word
            for name, option in options.items()
            for word in (f"--{option}", tmp_path / Path(name).name)
        ]
        assert set(verified(place, *more)[1].values()) == {claims.HOLDS}
    finally:
        for name in away:
            (tmp_path / Path(name).name).rename(place.folder / name)


def test_documents_of_another_version_of_the_project_hold(place, monkeypatch):
    """Its words may be others; an edit is noticed all the same."""
    monkeypatch.setattr(evidence, "hash_code", lambda: "0" * 16)
    monkeypatch.setitem(phrases.PHRASES, "title", phrases.Phrase("A new title", "新标题"))
    path = place.card / "README.md"
    good = path.read_text(encoding="utf-8")
    assert verified(place)[0] == 0
    try:
        path.write_text(good.replace("0.69314", "0.69313"), encoding="utf-8")
        assert verified(place)[0] == 1
    finally:
        path.write_text(good, encoding="utf-8")


def test_a_first_loss_that_is_not_ln_2_is_noticed(place):
    card = json.loads(json.dumps(place.trained))
    card["step_0"]["dpo_loss"] = 0.7
    assert claims.check_step_0(card).state == claims.DIFFERS
    card["step_0"] |= {"dpo_loss": 0.6932, "logratio_size": 2.0}
    assert claims.check_step_0(card).state == claims.DIFFERS


@pytest.mark.parametrize(("value", "state"), [(0.75, claims.HOLDS), (0.7, claims.DIFFERS)])
def test_the_score_is_computed_again_if_asked(place, monkeypatch, value, state):
    """With --score, on the pairs and weights of the card; tests/test_quickstart.py does it."""
    from mindrlhf.inference import score

    def compute(settings, arguments):
        assert settings["run_mode"] == "score"
        assert settings["load_checkpoint"] == str(place.merged)
        assert arguments.score_data == str(place.data)
        assert arguments.reference_checkpoint is None
        fingerprint = record.read_card(place.card)["result"]["merged"]["fingerprint"]
        write_a_score(Path(arguments.output) / "score.json", fingerprint, place.data, value)

    monkeypatch.setattr(score, "score", compute)
    status, lines = verified(place, "--score", EXAMPLE / "score_glm4_tiny.yaml")
    assert status == (state == claims.DIFFERS)
    assert lines[next(line for line in lines if line.startswith("score, computed"))] == state


def test_no_device_that_a_card_names_is_read(place, tmp_path):
    """Before: /dev/zero as the tokenizer was read to the end of the memory."""
    content = read_json(place.card / "card.json")
    content["tokenizer"]["file"] = content["answers"]["file"] = "/dev/zero"
    write_json(tmp_path / "card.json", content, sealed=True)
    found = claims.find_claims(record.read_card(tmp_path), tmp_path, claims.Places())
    states = {claim.name: claim.check().state for claim in found}
    assert states["tokenizer: hash"] == states["answers before and after"] == claims.UNKNOWN


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file; give the folder of a card"),
        ("{", "not JSON"),
        ('{"format": 99}', "no card of this version"),
        ('{"format": 1, "run": 3}', "its run is missing or no dict"),
    ],
)
def test_what_is_no_card_ends_in_one_line(tmp_path, content, part):
    if content:
        (tmp_path / "card.json").write_text(content)
    result = subprocess.run(
        [shutil.which("python"), "-m", "mindrlhf.card", "verify", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert_one_error(result, part)


def test_values_of_wrong_types_end_in_one_line(place, tmp_path):
    for section in record.SECTIONS:
        content = read_json(place.card / "card.json")
        kind = record.SECTIONS[section]
        content[section] = {"x": [1]} if kind is dict else [{}]
        write_json(tmp_path / "card.json", content, sealed=True)
        result = outcome(tmp_path)
        assert "\n" not in str(result)


def outcome(folder):
    """Exit status of verification, or its error."""
    try:
        verify.main([str(folder)])
    except UserError as error:
        return str(error)
    except SystemExit as end:
        return end.code
    return 0


# adding


@pytest.mark.parametrize("command", [add, verify])
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert f"usage: python -m mindrlhf.card {command.__name__.split('.')[-1]}" in text
    examples = text.split("example:\n")[1].replace("\\\n", " ").splitlines()
    for example in filter(None, map(str.strip, examples)):
        command.parser().parse_args(shlex.split(example)[4:])


def test_results_of_other_weights_are_refused(place, golden, tmp_path):
    with pytest.raises(UserError, match="holds other weights than .*checkpoint_network"):
        add.main([str(place.card), "--checkpoint", str(golden.checkpoint)])
    write_a_score(tmp_path / "score.json", "f" * 64)
    with pytest.raises(UserError, match="is the score of other weights, ffffffffffff"):
        add.main([str(place.card), "--score", str(tmp_path)])
    (tmp_path / "x.jsonl").write_text('{"messages": [], "answer": ""}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: has no messages, answer, other_answer"):
        add.main([str(place.card), "--answers", str(tmp_path / "x.jsonl")])
    with pytest.raises(UserError, match="nothing to add"):
        add.main([str(place.card)])


@pytest.mark.parametrize(
    ("model", "plan", "merged", "words"),
    [
        ({"fingerprint": "m"}, {}, "m", None),
        ({"fingerprint": "m"}, {}, None, None),  # nothing tells
        ({"fingerprint": "b"}, {}, None, "is the score of the weights before training, b"),
        ({"fingerprint": "o"}, {}, "m", "is the score of other weights, o, than .* result, m"),
        ({"fingerprint": "b", "adapters": {}}, {}, None, "before training"),
        ({"fingerprint": "b", "adapters": {"fingerprint": "a"}}, {"lora": {}}, "m", None),
        ({"fingerprint": "m", "adapters": {"fingerprint": "a"}}, {}, "m", "is the score of adap"),
    ],
)
def test_a_score_is_that_of_the_result_whenever_it_was_added(model, plan, merged, words):
    """As after add --score before add --checkpoint."""
    result = {"shards": {"rank_0": "s"}}
    if merged:
        result["merged"] = {"file": "merged.ckpt", "fingerprint": merged}
    card = {"base": {"fingerprint": "b"}, "plan": plan, "result": result}
    add.require_scored_result(card)
    card["score"] = {"file": "score.json", "model": model}
    if words is None:
        add.require_scored_result(card)
        return
    with pytest.raises(UserError, match=f"^score.json: .*{words}"):
        add.require_scored_result(card)


def test_the_merge_of_shards_is_compared_with_them(tmp_path):
    """Shards of a parallel plan have other fingerprints than their merge."""
    shards = write_shards(tmp_path / "out/checkpoint_network", "2x2", whole())
    (shards / "strategy").rename(tmp_path / "out/strategy")
    merge(shards, tmp_path / "x.ckpt", src_strategy=tmp_path / "out/strategy")
    write(tmp_path / "other.ckpt", whole(seed=1))
    card = {"result": {"shards": {"rank_0": "0" * 64}}, "plan": {}, "base": {}}
    add.add_checkpoint(card, tmp_path / "out/card", str(tmp_path / "x.ckpt"))
    assert card["result"]["merged"]["weights"] == "checkpoint_network"
    with pytest.raises(UserError, match=r"other\.ckpt: holds other weights than .*_network"):
        add.add_checkpoint(card, tmp_path / "out/card", str(tmp_path / "other.ckpt"))


def test_a_readme_of_somebody_else_stays(place, tmp_path):
    folder = tmp_path / "card"
    shutil.copytree(place.card, folder)
    (folder / "README.md").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a document of this card"):
        add.main([str(folder), "--answers", str(place.answers)])
    assert (folder / "README.md").read_text() == "mine"


def test_a_card_that_cannot_be_written_fails_no_training(place, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    settings = {"output_dir": str(tmp_path / "run")}
    record.write_after_training("x.yaml", settings)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'run/card'}: the card was not written (")


# text


def without_code(text):
    """Markdown without what is code."""
    text = re.sub(r"^(`{3,}).*\n(?:.*\n)*?\1$", "", text, flags=re.M)
    return re.sub(r"(?<!`)(`+)(?!`)(?:.*?[^`])?\1(?!`)", "", text)


def hostile(value):
    """A card with every text replaced."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("language", phrases.LANGUAGES)
def test_text_of_files_is_neither_markdown_nor_html(place, language):
    good = record.read_card(place.card)
    card = hostile(good)
    card["settings"]["values"][HOSTILE] = HOSTILE
    card["data"]["train"]["dropped"] = {HOSTILE: 3}
    text = render.render_card(card, language)
    outside = without_code(text)
    for part in ("script", "javascript", "no title"):
        assert part not in outside
    assert "\x1b" not in text
    assert "\u202e" not in text
    titles = [line for line in outside.splitlines() if line.startswith("#")]
    assert len(titles) == render.render_card(good, language).count("\n## ") + 1
    for line in text.splitlines():  # each row of a table has the cells of its header
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6)


def test_code_is_longer_than_what_it_holds():
    assert code_span("a`b") == "``a`b``"
    assert code_span("`") == "`` ` ``"
    assert code_span("a|b\n") == r"`a\|b\n`"
    assert fenced("```\nx").splitlines() == ["````text", "```", "x", "````"]
    assert code_span("你好　🧑‍💻") == "`你好　🧑‍💻`"


def test_commands_of_strangers_are_left_out_or_quoted():
    found = evidence.plain_commands(
        ["rm -rf ~", "python /tmp/x.py", "python convert_weight.py --a b; rm -rf ~", 3, "'",
         "python convert_weight.py $(rm -rf ~) `x` > y",
         "bash msrun_launcher.sh 'run_dpo.py; rm' 1", "bash evil.sh 'run_dpo.py' 2",
         "bash ../msrun_launcher.sh \"run_dpo.py --a '$(x)'\" 2"]
    )  # fmt: skip
    assert found == [
        "python convert_weight.py --a 'b;' rm -rf '~'",
        "python convert_weight.py '$(rm' -rf '~)' '`x`' '>' y",
        """bash ../msrun_launcher.sh 'run_dpo.py --a '"'"'$(x)'"'"'' 2""",
    ]


def test_the_launcher_passes_its_own_command_on(tmp_path):
    script = tmp_path / "run_dpo.py"
    script.write_text("from mindrlhf import cli\nprint(cli.command_line())\n")
    words = [
        "bash", f"{ROOT}/scripts/msrun_launcher.sh", f"{script} --x 'a b' --y 中文\\'s", "1", "0",
        str(tmp_path / "log"), "True", "60",
    ]  # fmt: skip
    result = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert shlex.split(result.stdout) == words
    (command,) = evidence.plain_commands([result.stdout.strip()])
    assert shlex.split(shlex.split(command)[2]) == [str(script), "--x", "a b", "--y", "中文's"]


# Hugging Face


def back(place, target, *more, source=None):
    convert_weight.main(
        ["--model", "glm-n", "--reversed", "--input_path", str(source or place.merged),
         "--output_path", str(target), "--dtype", "fp32", *map(str, more)]
    )  # fmt: skip


def front_matter_of(text):
    head, body = re.fullmatch(r"---\n(.*?)---\n\n(.*)", text, re.S).groups()
    return yaml.safe_load(head), body


def test_reversed_conversion_writes_the_model_card(place, tmp_path, capsys):
    back(place, tmp_path / "hf")
    fields, body = front_matter_of((tmp_path / "hf/README.md").read_text(encoding="utf-8"))
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert "dpo" in fields["tags"]
    assert not {"license", "base_model", "datasets"} & set(fields)  # not known of this model
    assert body == read(place)
    for name in ("README_CN.md", "card.json", "curves.png"):
        assert (tmp_path / "hf" / name).read_bytes() == (place.card / name).read_bytes()
    assert f"card of {place.card}" in capsys.readouterr().out
    status, lines = verified(SimpleNamespace(card=tmp_path / "hf"))
    assert status == 0
    assert claims.HOLDS in lines.values()


def test_a_readme_that_is_there_is_not_replaced(place, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        back(place, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_of_other_weights_is_no_model_card(place, golden, tmp_path, capsys):
    """Given, it is refused; found beside them, it is left out."""
    with pytest.raises(UserError, match="describes other weights than"):
        back(place, tmp_path / "hf", "--card", place.card, source=golden.checkpoint)
    assert not (tmp_path / "hf").exists()
    shutil.copytree(place.card, tmp_path / "card")
    for end in ("", ".json"):
        shutil.copy(f"{golden.checkpoint}{end}", tmp_path / f"x.ckpt{end}")
    back(place, tmp_path / "hf", source=tmp_path / "x.ckpt")
    assert not (tmp_path / "hf/README.md").exists()
    assert "no model card: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ({"model": {**model_card.SIZES_9B, "rope_ratio": 500}}, "THUDM/glm-4-9b-chat"),
        (
            {"model": {**model_card.SIZES_9B, "rope_ratio": 10000}, "layout": "glm"},
            "THUDM/glm-4-9b-chat-1m-hf",
        ),
        ({"model": {**model_card.SIZES_9B, "rope_ratio": 3}}, None),
        ({"model": {**model_card.SIZES_9B, "num_layers": 2, "rope_ratio": 500}}, None),
        ({"source": "/h/models--me--my-glm/snapshots/0a/"}, "me/my-glm"),
        ({}, None),
    ],
)
def test_the_base_model_is_that_of_the_cache_or_of_its_sizes(base, name):
    assert model_card.base_model(base) == name


def test_front_matter_names_what_is_known(place):
    card = {
        "base": {"model": {**model_card.SIZES_9B, "rope_ratio": 500}, "layout": "glm"},
        "data": {"train": {"source": [{"file": "/c/datasets--a--b/x.parquet"}, {"file": HOSTILE}]}},
    }
    fields, _ = front_matter_of(model_card.front_matter(card) + "\n")
    assert fields["base_model"] == "THUDM/glm-4-9b-chat-hf"
    assert fields["license"] == "other"
    assert fields["license_name"] == "glm-4"
    assert fields["datasets"] == ["a/b"]
