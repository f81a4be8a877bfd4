"""run_dpo.py in run_mode score: numbers, references, workers, types, files and errors."""

import json

import numpy as np
import pytest
import run_dpo
from conftest import EXAMPLE, GOLDEN, run_script, write_overlay

from mindrlhf import cli
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.tensors import TensorItem
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, preprocess
from mindrlhf.data.pair_types import NONE, PairTypes, encode_types, read_types
from mindrlhf.inference import score, score_record, score_report
from mindrlhf.inference.score_record import PAIRS, PICTURE, RECORD

BUILD = preprocess.build_scorer
SIDES = ("chosen", "rejected")
DPO = "dpo: {beta: 0.2, sft_weight: 0.5}\n"
TRAINING = (
    DPO
    + """
runner_config: {epochs: 1, batch_size: 1}
lr_schedule: {learning_rate: 1e-3, warmup_ratio: 0.0}
callbacks:
  - {type: DPOMonitor}
  - {type: EvalMonitor, eval_step_interval: 0}
  - {type: DPOCheckpointMonitor, prefix: glm4_dpo, save_checkpoint_steps: 9, keep_checkpoint_max: 1}
"""
)


@pytest.fixture(autouse=True)
def one_network(monkeypatch, made={}):  # noqa: B006  shared by all tests on purpose
    """Build the network of each size once; every run loads its own weights into it."""

    def cached(settings, tokenizer, *, packed=True):
        model = settings["model"]["model_config"]
        key = (model["seq_length"], settings["runner_config"]["batch_size"])
        if key not in made:
            made[key] = BUILD(settings, tokenizer, packed=packed)
        return made[key]

    monkeypatch.setattr(preprocess, "build_scorer", cached)


@pytest.fixture(scope="module")
def trained(golden):
    """The golden case, trained for an epoch: its merged weights, and the last evaluation."""
    import transform_checkpoint

    output, yaml = golden.folder / "for_score", golden.folder / "for_score.yaml"
    options = [
        "--train_dataset",
        golden.data,
        "--eval_dataset",
        golden.data,
        "--output_dir",
        output,
    ]
    result = run_script(
        EXAMPLE / "run_dpo.py",
        *("--config", write_overlay(yaml, "finetune", TRAINING), *options),
        *("--vocab_file", golden.tokenizer, "--load_checkpoint", golden.checkpoint),
    )
    assert result.returncode == 0, result.stderr
    merged = golden.folder / "for_score.ckpt"
    shards = output / "checkpoint_network"
    transform_checkpoint.main([f"--src_checkpoint={shards}", f"--dst_checkpoint={merged}"])
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return merged, shards, [record for record in records if record["split"] == "eval"][-1]


@pytest.fixture(scope="module")
def options(golden):
    write_overlay(golden.score, "score", DPO)
    return ["--config", str(golden.score), "--vocab_file", str(golden.tokenizer)]


def run(options, data, weights, output, *more):
    """Score; return the record and the lines of the pairs."""
    run_dpo.main(
        [
            *options,
            *("--score_data", str(data), "--load_checkpoint", str(weights)),
            *("--output", str(output), *map(str, more)),
        ]
    )
    lines = (output / PAIRS).read_text(encoding="utf-8").splitlines()
    return score_record.load(output), list(map(json.loads, lines))


def rank(monkeypatch, number, workers):
    monkeypatch.setenv("RANK_ID", str(number))
    monkeypatch.setenv("MS_WORKER_NUM", str(workers))


def values(lines, *names):
    return np.array([[line[name] for name in names] for line in lines])


LOGPS = [f"{kind}{side}_logps" for kind in ("", "reference_") for side in SIDES]


# the numbers


def test_a_score_is_the_evaluation_of_training(golden, options, trained, tmp_path, capsys):
    merged, shards, evaluation = trained
    found, lines = run(options, golden.data, merged, tmp_path / "a")
    for name, value in evaluation.items():
        if name not in ("split", "step", "epoch", "num_tokens", "padding"):
            assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert found.accuracy.pairs == len(lines) == 8
    assert found.margin.value == pytest.approx(evaluation["rewards/margins"], rel=1e-5)
    assert abs(found.margin.value) > 0.1
    shown = capsys.readouterr().out
    assert f"dpo_loss {evaluation['dpo_loss']:.4f}" in shown
    assert shown.count("\n") < 35
    by_shards, _ = run(options, golden.data, shards, tmp_path / "b", "--auto_trans_ckpt", "True")
    assert by_shards.metrics == found.metrics
    sides = values(lines, *LOGPS)
    rewards = 0.2 * (sides[:, :2] - sides[:, 2:])
    np.testing.assert_allclose(values(lines, "chosen_reward", "rejected_reward"), rewards, 1e-5)
    np.testing.assert_allclose(values(lines, "margin")[:, 0], -np.diff(rewards)[:, 0], 1e-4)


def test_log_probs_are_pytorch_s(golden, options, expected, tmp_path):
    """Policy and reference of a file of text, where nothing but the weights says what they are."""
    _, lines = run(
        options,
        *(golden.pairs, golden.checkpoint, tmp_path / "a"),
        *("--reference_checkpoint", golden.checkpoint),
    )
    wanted = [[pair[f"ref_{side}_logps"] for side in SIDES] for pair in expected["pairs"]]
    assert np.abs(values(lines, *LOGPS) - np.tile(wanted, 2)).max() < 3e-4
    tokens = [[len(pair[f"{side}_ids"]) for side in SIDES] for pair in expected["pairs"]]
    assert values(lines, "chosen_tokens", "rejected_tokens").tolist() == tokens


def test_the_base_ties_with_itself(golden, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preprocess, "build_scorer", None)  # the data hold all log-probs
    found, lines = run(options, golden.data, golden.checkpoint, tmp_path / "a")
    assert (found.accuracy.value, found.accuracy.ties, found.margin.value) == (0.5, 8, 0.0)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert found.metrics["dpo_loss"] == pytest.approx(np.log(2))
    assert found.metrics["rewards/accuracies"] == 0
    assert not values(lines, "margin").any()
    assert "ties       all 8, because the weights are those of the reference" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "loss", ["{loss_type: ipo}", "{average_log_prob: True}", "{label_smoothing: 0.2}"]
)
def test_other_losses(golden, options, trained, tmp_path, loss):
    """As losses.py defines them, in NumPy."""
    yaml = write_overlay(tmp_path / "x.yaml", "score", f"dpo: {loss}\n")
    given = ["--config", str(yaml), *options[2:]]
    found, lines = run(given, golden.data, trained[0], tmp_path / "a")
    sides, tokens = values(lines, *LOGPS), values(lines, "chosen_tokens", "rejected_tokens")
    ratios = sides[:, :2] - sides[:, 2:]
    if "smoothing" not in loss:
        ratios = ratios / tokens
    logits = -np.diff(ratios)[:, 0]
    losses = {
        "ipo": (logits - 5) ** 2,
        "average": np.log1p(np.exp(-0.1 * logits)),
        "smoothing": 0.8 * np.log1p(np.exp(-0.1 * logits)) + 0.2 * np.log1p(np.exp(0.1 * logits)),
    }
    wanted = next(each for name, each in losses.items() if name in loss)
    assert found.metrics["dpo_loss"] == pytest.approx(wanted.mean(), rel=1e-4)
    assert found.margin.value == pytest.approx(0.1 * logits.mean(), rel=1e-4)


# references


def test_text_needs_a_reference_and_then_equals_the_rows(golden, options, trained, tmp_path):
    with pytest.raises(UserError, match=r"no reference log-probs; add --reference_checkpoint"):
        run(options, golden.pairs, trained[0], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    rows, by_row = run(options, golden.data, trained[0], tmp_path / "rows")
    text, by_text = run(
        options,
        *(golden.pairs, trained[0], tmp_path / "text"),
        *("--reference_checkpoint", golden.checkpoint),
    )
    assert np.abs(values(by_row, *LOGPS) - values(by_text, *LOGPS)).max() < 1e-4
    for name in ("pair", "type", "prompt", "chosen_tokens"):
        assert [line[name] for line in by_row] == [line[name] for line in by_text]
    assert by_text[3]["place"].endswith("pairs.jsonl:4")
    assert {rows.reference["fingerprint"]} == {text.reference["fingerprint"]}
    assert text.accuracy == rows.accuracy
    assert text.metrics["tokens"] == rows.metrics["tokens"]
    same, _ = run(
        options,
        *(golden.data, trained[0], tmp_path / "rows"),
        *("--reference_checkpoint", golden.checkpoint),
    )
    assert same == rows  # the data hold its log-probs: there is nothing to do
    again, lines = run(
        options,
        *(golden.data, trained[0], tmp_path / "again"),
        *("--reference_checkpoint", trained[0]),
    )
    assert again.accuracy.ties == 8  # the option replaces the log-probs in the data
    assert np.abs(values(lines, *LOGPS[2:]) - values(by_row, *LOGPS[:2])).max() < 1e-4


def adapters_of(golden, path, zero=False):
    """An adapter of one matrix, and the base with it: paths of both."""
    base = containers.open_tensors(golden.checkpoint)
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h"
    size_out, size_in = base[f"{name}.weight"].shape
    random = np.random.default_rng(0)
    a = random.normal(size=(2, size_in)).astype(np.float32)
    b = random.normal(size=(size_out, 2)).astype(np.float32) * (0 if zero else 0.3)
    half = f"{name}.mindpet_delta_lora_"
    stored = {f"{half}a": a, f"{half}b": b, "lora_rank": np.float32(2), "lora_alpha": np.float32(4)}
    full = {each: tensor.float32() for each, tensor in base.items()}
    full[f"{name}.weight"] = full[f"{name}.weight"] + 2 * (b @ a)
    for file, arrays in ((path, stored), (path.with_suffix(".full.ckpt"), full)):
        containers.write_tensors(
            file, [TensorItem.of_array(each, "F32", value) for each, value in arrays.items()]
        )
    return path, path.with_suffix(".full.ckpt")


def test_adapters_equal_merged_weights_and_bring_their_reference(golden, options, tmp_path):
    adapters, merged = adapters_of(golden, tmp_path / "adapters.ckpt")
    wanted, merged_lines = run(
        options,
        *(golden.pairs, merged, tmp_path / "merged"),
        *("--reference_checkpoint", golden.checkpoint),
    )
    assert abs(wanted.margin.value) > 0.01
    for name, more in (("default", []), ("base", ["--reference_checkpoint", "base"])):
        found, lines = run(
            options,
            *(golden.pairs, golden.checkpoint, tmp_path / name),
            *("--adapter_checkpoint", adapters, *more),
        )
        assert np.abs(values(lines, *LOGPS) - values(merged_lines, *LOGPS)).max() < 1e-4
        assert found.model["adapters"]["file"] == str(adapters)
        assert found.reference["fingerprint"] == wanted.reference["fingerprint"]
    rows, _ = run(
        options,
        *(golden.data, golden.checkpoint, tmp_path / "rows"),
        *("--adapter_checkpoint", adapters),
    )
    assert rows.margin.value == pytest.approx(wanted.margin.value, abs=1e-4)


# workers, interruptions, folders


@pytest.fixture(scope="module")
def many(golden):
    """40 pairs of 20 prompts, in their own words."""
    rows = [json.loads(line) for line in (GOLDEN / "pairs.jsonl").read_text().splitlines()]
    path = golden.folder / "many_for_score.jsonl"
    made = [
        {**rows[number % 8], "prompt": f"{rows[number // 2 % 8]['prompt'][:20]} {number // 2}"}
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return path


def test_two_workers_equal_one(golden, options, trained, many, tmp_path, monkeypatch, capsys):
    more = ["--reference_checkpoint", golden.checkpoint]
    wanted, _ = run(options, many, trained[0], tmp_path / "one", *more)
    capsys.readouterr()
    rank(monkeypatch, 1, 2)
    with pytest.raises(FileNotFoundError):  # only its parts: the results are rank 0's
        run(options, many, trained[0], tmp_path / "two", *more)
    assert capsys.readouterr().out == ""
    parts = sorted(path.name for path in (tmp_path / "two").glob("*.parts/*"))
    assert parts == ["part-000001.safetensors"] * 2
    rank(monkeypatch, 0, 2)
    found, _ = run(options, many, trained[0], tmp_path / "two", *more)
    assert found == wanted
    for name in (RECORD, PAIRS):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two
    assert {path.name for path in (tmp_path / "two").iterdir()} == {RECORD, PAIRS, PICTURE}


def test_a_stopped_score_goes_on(golden, options, trained, many, tmp_path, monkeypatch):
    more, scored = ["--reference_checkpoint", golden.checkpoint], []
    fill = score.fill_network

    def stopped(network, model):
        fill(network, model)
        scored.append(model.settings["load_checkpoint"])
        if len(scored) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(score, "fill_network", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(options, many, trained[0], tmp_path / "a", *more)
    run(options, many, trained[0], tmp_path / "a", *more)
    base = str(golden.checkpoint)
    assert scored == [base, str(trained[0]), str(trained[0])]  # the reference pass is not repeated
    (tmp_path / "a" / RECORD).unlink()
    run(options, many, trained[0], tmp_path / "a", *more)
    assert scored[3:] == [base, str(trained[0])]


def test_scores_do_not_mix(golden, options, trained, tmp_path, capsys, monkeypatch):
    first, _ = run(options, golden.data, trained[0], tmp_path / "a")
    capsys.readouterr()
    monkeypatch.setattr(preprocess, "build_scorer", None)
    again, _ = run(options, golden.data, trained[0], tmp_path / "a")  # nothing to do
    assert again == first
    assert "has this score already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"score.json: exists, made from other inputs"):
        run(options, golden.data, golden.checkpoint, tmp_path / "a")
    other, _ = run(options, golden.data, golden.checkpoint, tmp_path / "a", "--overwrite")
    assert other.run != first.run
    for name, part in ((RECORD, "is not a score"), (PAIRS, "is not a score's"), (PICTURE, "PNG")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=part):
            run(options, golden.data, golden.checkpoint, folder, "--overwrite")
        assert (folder / name).read_text() == "mine"


def test_the_folder_is_below_output_dir_by_default(golden, options, tmp_path):
    run_dpo.main(
        [*options, "--score_data", str(golden.data), "--load_checkpoint", str(golden.checkpoint)]
        + ["--output_dir", str(tmp_path)]
    )
    assert score_record.load(tmp_path / "score").accuracy.ties == 8


def test_the_record_is_sealed(golden, options, tmp_path):
    run(options, golden.data, golden.checkpoint, tmp_path)
    path = tmp_path / RECORD
    content = path.read_text(encoding="utf-8")
    assert "a tie counts one half" in content
    for text, part in (
        (content.replace("0.5", "0.9", 1), "was changed or damaged"),
        (content.replace('"format": 1', '"format": 2').replace('"seal"', '"x"'), "score again"),
        ("{", "not JSON"),
        ('{"format": 1}', "no complete score"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=part):
            score_record.load(path)


# types


def test_types_are_carried_into_the_data(golden, options, trained, tmp_path):
    found, lines = run(options, golden.data, trained[0], tmp_path / "a")
    rows = [json.loads(line) for line in golden.pairs.read_text().splitlines()]
    wanted = [f"{row['pos_type']} > {row['neg_type']}" for row in rows]
    assert [line["type"] for line in lines] == wanted
    slices = {each.name: each for each in found.slices["type"]}
    assert {name: each.accuracy.pairs for name, each in slices.items()} == {
        name: wanted.count(name) for name in wanted
    }
    name = wanted[0]
    own = [line["margin"] for line in lines if line["type"] == name]
    assert slices[name].margin.value == pytest.approx(np.mean(own))
    assert len(json.dumps(mindrecord.read_data_sidecar(golden.data)["types"])) < 400


def test_data_of_before_have_no_types(golden, options, trained, tmp_path):
    path = tmp_path / "old.mindrecord"
    sidecar = mindrecord.read_data_sidecar(golden.data)
    del sidecar["types"], sidecar["format"]
    mindrecord.write_rows(path, mindrecord.read_rows(golden.data), sidecar)
    found, lines = run(options, path, trained[0], tmp_path / "a")
    assert "type" not in found.slices
    assert "type" not in lines[0]
    assert found.accuracy.pairs == 8


def test_types_are_as_many_as_the_pairs():
    numbers = np.array([0, 1, NONE, 1], np.uint8)
    sidecar = {"pairs": {"written": 4}, **encode_types(PairTypes(["a > b", "c > d"], numbers))}
    found = read_types(sidecar, "x")
    assert found.numbers.tolist() == [0, 1, NONE, 1]
    assert [found.name(pair) for pair in range(3)] == ["a > b", "c > d", None]
    assert encode_types(PairTypes([], np.full(4, NONE, np.uint8))) == {}
    bad = [{"written": 3}, {"written": 5}]
    for change in [
        *({"pairs": each} for each in bad),
        {"types": {"names": ["a"], "pairs": sidecar["types"]["pairs"]}},
        {"types": {"names": ["a", "b"], "pairs": "?"}},
        {"types": []},
    ]:
        with pytest.raises(UserError, match=r"x\.json: its types"):
            read_types({**sidecar, **change}, "x")


@pytest.mark.parametrize("workers", [1, 2])
def test_types_follow_their_pairs_into_both_files(golden, tmp_path, many, monkeypatch, workers):
    import dpo_preprocess_glm4_parallel

    path = tmp_path / "a.mindrecord"
    arguments = ["--src", many, "--dst", path, "--config", golden.process, "--eval_ratio", "0.3"]
    arguments += ["--tokenizer", golden.tokenizer, "--load_checkpoint", golden.checkpoint]
    for number in reversed(range(workers)):
        rank(monkeypatch, number, workers)
        dpo_preprocess_glm4_parallel.main(list(map(str, arguments)))
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    for file in (path, tmp_path / "a_eval.mindrecord"):
        types = read_types(mindrecord.read_data_sidecar(file), str(file))
        numbers = [
            number
            for row in mindrecord.read_rows(file, ["pair_ids"])
            for number in row["pair_ids"].tolist()
            if number >= 0
        ]
        assert [types.name(place) for place in range(len(numbers))] == [
            f"{rows[number]['pos_type']} > {rows[number]['neg_type']}" for number in sorted(numbers)
        ]


# errors


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--score_data", "none.jsonl"], r"none.jsonl: no such file"),
        (["--score_data", "CHECKPOINT"], r"is a checkpoint; --score_data takes"),
        (["--score_data", "EMPTY"], r"holds no pairs"),
        (["--batch_size", "9"], r"--batch_size 9: .* has 3 rows; give at most 3"),
        (["--dataset_type", "dpo"], r"--dataset_type is for files of pairs"),
        (["--reference_checkpoint", "base"], r"base needs --adapter_checkpoint"),
        (["--reference_checkpoint", "none.ckpt"], r"none.ckpt: no such file"),
        (["--predict_data", "x"], r"--predict_data is for run_mode predict"),
        (["--vocab_file", ""], r"no tokenizer given; --vocab_file"),
        (["--vocab_file", "OTHER"], r"tokenizer was .*now"),
        (["--load_checkpoint", ""], r"no weights given"),
        (["--output", "CHECKPOINT"], r"is a file; --output is the folder"),
    ],
)
def test_errors(golden, options, tmp_path, more, part):
    (tmp_path / "empty.jsonl").write_text("\n")
    other = tmp_path / "tokenizer.model"  # two tokens exchanged
    lines = golden.tokenizer.read_bytes().splitlines()
    swapped = [line.rsplit(b" ", 1)[0] for line in lines]
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    other.write_bytes(b"".join(b"%b %d\n" % (t, n) for n, t in enumerate(swapped)))
    named = {
        "CHECKPOINT": str(golden.checkpoint),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "OTHER": str(other),
    }
    arguments = [
        *options,
        *("--score_data", str(golden.data), "--load_checkpoint", str(golden.checkpoint)),
        *("--output", str(tmp_path / "a"), *(named.get(word, word) for word in more)),
    ]
    with pytest.raises(UserError, match=part):
        run_dpo.main(arguments)
    assert not (tmp_path / "a").exists()


def test_options_and_data_of_other_modes(golden, options, tmp_path):
    with pytest.raises(UserError, match="needs --score_data"):
        run_dpo.main(options)
    predict = ["--config", str(golden.predict), *options[2:]]
    for option in ("--score_data", "--reference_checkpoint"):
        with pytest.raises(UserError, match=f"{option} is for run_mode score"):
            run_dpo.main([*predict, option, "x"])
    with pytest.raises(UserError, match="--output is for run_mode predict and score"):
        run_dpo.main(["--config", str(golden.finetune), *options[2:], "--output", "x"])
    yaml = write_overlay(tmp_path / "x.yaml", "score", "eval_only: True\n")
    with pytest.raises(UserError, match=r"eval_only: .*score_glm4_9b.yaml --score_data FILE"):
        run_dpo.main(["--config", str(yaml), *options[2:]])


def test_a_parallel_plan_loads_one_set_of_weights(golden, options, tmp_path, monkeypatch):
    plan = (
        "parallel: {parallel_mode: 1, full_batch: FULL}\n"
        "parallel_config: {data_parallel: 1, model_parallel: 2, vocab_emb_dp: False}\n"
    )
    rank(monkeypatch, 0, 2)
    base = ["--reference_checkpoint", golden.checkpoint]
    for full, part in (("True", "only one set of weights"), ("False", "full_batch must be True")):
        yaml = write_overlay(tmp_path / "x.yaml", "score", plan.replace("FULL", full))
        given = ["--config", str(yaml), *options[2:]]
        with pytest.raises(UserError, match=part):
            run(given, golden.pairs, golden.checkpoint, tmp_path / "a", *base)


def test_the_rows_of_a_batch_can_be_cut_for_the_cards_of_a_plan(
    golden, options, tmp_path, monkeypatch
):
    """Three rows, but two data-parallel groups."""
    yaml = write_overlay(
        tmp_path / "x.yaml",
        "score",
        "parallel: {parallel_mode: 1, full_batch: True}\n"
        "parallel_config: {data_parallel: 2, model_parallel: 1, vocab_emb_dp: False}\n"
        "runner_config: {batch_size: 8}\n",
    )
    rank(monkeypatch, 0, 2)
    tasks = []
    monkeypatch.setattr(score, "run_task", lambda task, **_: tasks.append(task))
    arguments = ["--config", yaml, *options[2:], "--score_data", golden.data, "--load_checkpoint"]
    run_dpo.main(list(map(str, [*arguments, golden.checkpoint, "--output", tmp_path / "a"])))
    assert tasks[0].data.rows == 3
    assert tasks[0].settings["runner_config"]["batch_size"] == 4


# the picture and the screen


def test_the_picture_has_a_line_at_0_units_and_types(tmp_path, monkeypatch):
    import matplotlib.figure

    drawn = []
    make = matplotlib.figure.Figure.subplots
    monkeypatch.setattr(
        matplotlib.figure.Figure, "subplots", lambda *given: drawn.append(make(*given)) or drawn[-1]
    )
    record = score_record.Score(
        *("preferences", "x", {}, {}, None, {"beta": 0.1}, {}),
        score_record.Accuracy(0.75, 0.3, 0.9, 4, 2, 0),
        *(score_record.Mean(1.0, 0.1), {}, {}),
    )
    names = ["拒绝为主 > 风险回复", "甲 > 乙", "$x_{\x1b > $"]
    types = PairTypes(names, np.array([0, 0, 1, 2], np.uint8))
    margins = np.array([-1, 2, 3, 4], np.float32)
    assert score_report.draw_margins(tmp_path / "x.png", margins, types, record)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn
    assert [line.get_xdata() for line in axis.lines] == [[0, 0]]
    assert axis.get_xlabel() == "margin: chosen - rejected reward, beta x nats"
    shown = [text.get_text() for text in axis.get_legend().get_texts()]
    assert shown[1:4] == ["refusal > risk: 2", "type 2: 1", r"\$x_{\x1b > \$: 1"]


def test_progress_is_shown(golden, options, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINDRLHF_TERMINAL", "1")
    run(options, golden.data, trained[0], tmp_path)
    assert "8/8" in capsys.readouterr().err
    assert cli.rank() == 0
