"""Training on the golden case, through the commands."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    ROOT,
    RUN_DPO,
    SEQ_LEN,
    arguments,
    assert_one_error,
    load_model,
    records,
    run_script,
    training_yaml,
)
from mindspore import nn, ops

from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.checkpoints.tensors import TensorItem
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord
from mindrlhf.records import COLUMNS


@pytest.fixture(scope="module")
def run(golden):
    """One training run in one process, 3 rows in batches of 1, two epochs, with an evaluation."""
    output = golden.folder / "run"
    config = training_yaml(golden.folder, "plain")
    result = run_script(
        RUN_DPO, *arguments(golden, config, output, more=["--eval_dataset", golden.data])
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == ""  # quiet
    return output, result.stdout


def test_step_0_is_ln_2_with_rewards_of_0(run):
    first = records(run[0])[0]
    assert first["step"] == 1
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["loss"] == first["dpo_loss"]  # sft_weight 0
    assert abs(first["rewards/chosen"]) < 1e-4
    assert abs(first["rewards/rejected"]) < 1e-4


def test_every_pair_is_trained_once_an_epoch(run):
    assert sum(step["pairs"] for step in records(run[0])) == 2 * 8


def test_training_raises_the_margin_on_the_evaluated_pairs(run):
    before, after = records(run[0], "eval")
    assert (before["step"], after["step"]) == (0, 6)
    assert before["pairs"] == after["pairs"] == 8
    assert abs(before["rewards/margins"]) < 1e-4
    assert after["rewards/accuracies"] == 1
    assert after["rewards/margins"] > 1


TRL = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
       "logps/chosen", "logps/rejected"}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "eval"])
def test_tags_of_tensorboard_are_split_and_name_of_metrics_jsonl(run, split):
    events = b"".join(path.read_bytes() for path in (run[0] / "tensorboard").iterdir())
    for record in records(run[0], split):
        assert record.keys() >= TRL
        names = [name for name, value in record.items() if isinstance(value, (int, float))]
        missing = [name for name in names if f"{split}/{name}".encode() not in events]
        assert missing == ["step"]


def test_the_console_tells_it_in_one_line_a_step(run):
    lines = [line for line in run[1].splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    assert "loss 0.6931 (dpo 0.6931)" in lines[0]


@pytest.fixture(scope="module")
def two_workers(golden):
    """The same rows with two workers (a global batch of 2, the last one filled up), compared with
    one worker and batches of 2.
    """
    outputs = {}
    config = training_yaml(golden.folder, "two", shuffle=False, sft_weight=1.0)
    with config.open("a") as file:  # as inherited from a YAML with parallel_mode 1
        file.write("parallel: {gradients_mean: False}\n")
    outputs["two"] = golden.folder / "run_two"
    command = " ".join(map(str, [RUN_DPO, *arguments(golden, config, outputs["two"])]))
    result = subprocess.run(
        [
            "bash",
            str(ROOT / "scripts/msrun_launcher.sh"),
            command,
            "2",
            "0",
            str(golden.folder / "log_two"),
            "True",
            "120",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[INFO]" not in result.stdout + result.stderr
    outputs["one"] = golden.folder / "run_one"
    config = training_yaml(golden.folder, "one", shuffle=False, sft_weight=1.0, batch_size=2)
    result = run_script(RUN_DPO, *arguments(golden, config, outputs["one"]))
    assert result.returncode == 0, result.stderr
    return outputs


def test_two_workers_train_as_one_does(two_workers):
    one, two = records(two_workers["one"]), records(two_workers["two"])
    assert [step["pairs"] for step in one] == [step["pairs"] for step in two] == [5, 3, 5, 3]
    for left, right in zip(one, two):
        for name in (
            "loss",
            "dpo_loss",
            "sft_loss",
            "rewards/margins",
            "logps/chosen",
            "grad_norm",
        ):
            assert left[name] == pytest.approx(right[name], rel=2e-4, abs=1e-4), (
                left["step"],
                name,
            )


def test_replicas_merge_to_one_verified_checkpoint(two_workers, golden, tmp_path, capsys):
    import transform_checkpoint

    source = two_workers["two"]
    transform_checkpoint.main(
        [
            "--src_checkpoint",
            str(source / "checkpoint_network"),
            "--src_strategy",
            str(source / "strategy"),
            "--dst_checkpoint",
            str(tmp_path / "new" / "merged"),
        ]
    )
    assert "24 parameters" in capsys.readouterr().out
    merged = containers.open_tensors(tmp_path / "new/merged/merged.ckpt")
    before = containers.open_tensors(golden.checkpoint)
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: t.shape for name, t in before.items()
    }
    assert any(
        not np.array_equal(merged[name].array(), before[name].array()) for name in before
    )  # trained


@pytest.mark.parametrize("damage", ["missing", "other", "empty", "cut"])
def test_ranks_that_do_not_belong_together_are_not_merged(two_workers, golden, tmp_path, damage):
    import transform_checkpoint

    shutil.copytree(two_workers["two"] / "checkpoint_network", tmp_path / "source")
    (second,) = (tmp_path / "source/rank_1").glob("*.ckpt")
    if damage == "missing":
        (tmp_path / "source/rank_1").rename(tmp_path / "source/rank_2")
    elif damage == "other":
        shutil.copy(golden.checkpoint, second)
    elif damage == "empty":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(UserError, match="rank_1"):
        transform_checkpoint.main(
            [
                "--src_checkpoint",
                str(tmp_path / "source"),
                "--dst_checkpoint",
                str(tmp_path / "out"),
            ]
        )
    assert not (tmp_path / "out").exists()


def test_resumed_run_goes_on_as_the_unbroken_one_and_needs_no_check(run, golden, tmp_path):
    output, _ = run
    state = output / "checkpoint/rank_0/glm4_dpo-step_00000003.ckpt"
    config = training_yaml(golden.folder, "plain")
    result = run_script(
        RUN_DPO,
        *arguments(
            golden,
            config,
            tmp_path / "resumed",
            more=["--resume", state, "--eval_dataset", golden.data],
        ),
    )
    assert result.returncode == 0, result.stderr
    resumed, unbroken = records(tmp_path / "resumed"), records(output)[3:]
    assert [step["step"] for step in resumed] == [step["step"] for step in unbroken] == [4, 5, 6]
    for left, right in zip(resumed, unbroken):
        assert {
            name: left[name]
            for name in ("loss", "rewards/margins", "learning_rate", "grad_norm", "pairs")
        } == {
            name: right[name]
            for name in ("loss", "rewards/margins", "learning_rate", "grad_norm", "pairs")
        }


def other_weights(golden, path):
    """The golden weights with one matrix scaled by 1.5: another checkpoint of the same shapes."""
    tensors = containers.open_tensors(golden.checkpoint)
    scaled = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    containers.write_tensors(
        path,
        [
            TensorItem(*t.spec, lambda t=t, name=name: t.array() * (1.5 if name == scaled else 1))
            for name, t in tensors.items()
        ],
    )
    return path


def test_weights_other_than_the_preprocessings_stop_before_the_first_step(golden, tmp_path):
    weights = other_weights(golden, tmp_path / "other.ckpt")
    result = run_script(
        RUN_DPO,
        *arguments(
            golden, training_yaml(golden.folder, "plain"), tmp_path / "out", weights=weights
        ),
    )
    assert_one_error(result, "was not made for this run", "checkpoint was", golden.checkpoint)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_policy_that_is_not_the_reference_stops_at_the_first_step(golden, tmp_path):
    """The sidecar agrees, so only the step itself can detect the difference."""
    weights = other_weights(golden, tmp_path / "other.ckpt")
    data = copy_data(
        golden,
        tmp_path,
        checkpoint={
            "file": "other.ckpt",
            "fingerprint": fingerprints.fingerprint(containers.open_tensors(weights)),
        },
    )
    config = training_yaml(golden.folder, "plain")
    result = run_script(
        RUN_DPO, *arguments(golden, config, tmp_path / "out", weights=weights, data=data)
    )
    assert_one_error(result, "policy and reference differ by", "dpo.check_reference False")
    assert not list((tmp_path / "out").glob("checkpoint*/rank_0/*.ckpt"))
    config = training_yaml(golden.folder, "unchecked", check=False)
    result = run_script(
        RUN_DPO, *arguments(golden, config, tmp_path / "out", weights=weights, data=data)
    )
    assert result.returncode == 0, result.stderr


def copy_data(golden, folder, **changes):
    """The golden data with another sidecar. MindSpore needs the file's original name."""
    for suffix in ("", ".db", ".json"):
        shutil.copy(f"{golden.data}{suffix}", folder / f"{golden.data.name}{suffix}")
    sidecar = folder / f"{golden.data.name}.json"
    content = {**json.loads(sidecar.read_text()), **changes}
    del content["seal"]
    sidecar.write_text(json.dumps(content))
    return folder / golden.data.name


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seq_len": 64}, "seq_len was 64 (in the data), now 384"),
        ({"template": "llama"}, "template was llama"),
        (
            {"tokenizer": {"file": "other.model", "sha256": "0" * 64}},
            "tokenizer was 000000000000... (other.model)",
        ),
        ({"format": 0}, "format 0"),
    ],
)
def test_data_made_otherwise_are_refused(golden, tmp_path, changes, part):
    import run_dpo

    data = copy_data(golden, tmp_path, **changes)
    with pytest.raises(UserError) as error:
        run_dpo.main(
            [
                *map(
                    str,
                    arguments(
                        golden, training_yaml(golden.folder, "plain"), tmp_path / "out", data=data
                    ),
                )
            ]
        )
    assert part in str(error.value)


@pytest.mark.parametrize("lacking", ["", ".db", ".json"])
def test_data_that_are_not_whole_are_refused(golden, tmp_path, lacking):
    import run_dpo

    data = copy_data(golden, tmp_path)
    (tmp_path / f"{data.name}{lacking}").unlink()
    with pytest.raises(UserError, match="no such file"):
        run_dpo.main(
            [
                *map(
                    str,
                    arguments(
                        golden, training_yaml(golden.folder, "plain"), tmp_path / "out", data=data
                    ),
                )
            ]
        )


# weights: strict, both ways, for training and prediction alike


@pytest.fixture
def damaged(golden, tmp_path, request):
    tensors = list(containers.open_tensors(golden.checkpoint).values())
    items = [TensorItem(*t.spec, t.array) for t in tensors]
    name = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    if request.param == "missing":
        items = [item for item in items if item.name != name]
    elif request.param == "not in the model":
        name = "transformer.extra.weight"
        items.append(TensorItem(name, "F32", (2,), lambda: np.zeros(2, "f4")))
    else:
        items = [
            item._replace(shape=(3,), make=lambda: np.zeros(3, "f4")) if item.name == name else item
            for item in items
        ]
    containers.write_tensors(tmp_path / "damaged.ckpt", items)
    return tmp_path / "damaged.ckpt", request.param, name


@pytest.mark.parametrize(
    "damaged", ["missing", "not in the model", "of another shape"], indirect=True
)
@pytest.mark.parametrize("command", ["preprocess", "finetune", "predict"])
def test_weights_that_do_not_fit_stop_every_command(
    golden, tmp_path, damaged, command, monkeypatch
):
    import dpo_preprocess_glm4_parallel
    import run_dpo

    weights, problem, name = damaged
    common = ["--load_checkpoint", weights]
    calls = {
        "preprocess": (
            dpo_preprocess_glm4_parallel,
            [
                "--src",
                golden.pairs,
                "--dst",
                tmp_path / "x.mindrecord",
                "--config",
                golden.process,
                "--tokenizer",
                golden.tokenizer,
            ],
        ),
        "finetune": (
            run_dpo,
            [
                "--config",
                golden.finetune,
                "--train_dataset",
                golden.data,
                "--vocab_file",
                golden.tokenizer,
                "--output_dir",
                tmp_path / "out",
            ],
        ),
        "predict": (
            run_dpo,
            ["--config", golden.predict, "--vocab_file", golden.tokenizer, "--predict_data", "x"],
        ),
    }
    module, options = calls[command]
    with pytest.raises(UserError) as error:
        module.main([*map(str, options + common)])
    assert f"{problem}: {name}" in str(error.value)
    assert not (tmp_path / "x.mindrecord").exists()


@pytest.mark.parametrize("command", ["finetune", "predict"])
def test_no_command_runs_without_weights(golden, command):
    import run_dpo

    options = {"finetune": ["--train_dataset", golden.data], "predict": ["--predict_data", "x"]}[
        command
    ]
    with pytest.raises(UserError, match="no weights given"):
        run_dpo.main(
            [
                *map(
                    str,
                    [
                        "--config",
                        getattr(golden, command),
                        "--vocab_file",
                        golden.tokenizer,
                        *options,
                    ],
                )
            ]
        )


def test_predict_prints_the_answer_once_and_nothing_else(golden, expected):
    """The greedy continuation of the first pair, decoded: its first 16 tokens are PyTorch's."""
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    text = json.loads((GOLDEN / "pairs.jsonl").read_text().splitlines()[0])["prompt"]
    result = run_script(
        RUN_DPO,
        "--config",
        golden.predict,
        "--load_checkpoint",
        golden.checkpoint,
        "--auto_trans_ckpt",
        "False",
        "--vocab_file",
        golden.tokenizer,
        "--predict_data",
        text,
    )
    assert result.returncode == 0
    assert result.stderr == ""
    wanted = Glm4Tokenizer(golden.tokenizer).decode(expected["pairs"][0]["greedy_16"][:12]).strip()
    assert result.stdout.count(wanted) == 1
    assert result.stdout.startswith(wanted)


# the loss is the mean over the pairs of the global batch, however it is computed


def preferences(expected):
    """Reference log-probs that are not the policy's: (N, 2)."""
    return np.array(
        [
            [
                pair[f"ref_{side}_logps"] + shift * (1 + number % 3)
                for side, shift in (("chosen", 3.0), ("rejected", -2.0))
            ]
            for number, pair in enumerate(expected["pairs"])
        ]
    )


@pytest.fixture(scope="module")
def unpacked_columns(expected):
    """Eight rows of one pair each."""
    from test_glm4_dpo import columns, token_pairs

    return columns(
        mindrecord.make_rows(
            token_pairs(expected), preferences(expected), seq_len=SEQ_LEN, pad_id=316, packed=False
        )
    )


class Recorder(nn.Optimizer):
    """An optimizer that stores the gradients it gets as the weights' values."""

    def __init__(self, parameters):
        super().__init__(1.0, parameters)
        self.assign = ops.Assign()

    def construct(self, gradients):
        done = True
        for parameter, gradient in zip(self.parameters, gradients):
            done = ops.depend(done, self.assign(parameter, gradient))
        return done


def gradients_of(golden, columns, *, accumulation):
    """Clipped gradients of one training step, by name, and its outputs."""
    from mindrlhf.training.train_step import DPOTrainOneStepCell

    network = load_model(golden, "finetune").set_train(True)
    step = DPOTrainOneStepCell(network, Recorder(network.trainable_params()), 1e9, accumulation)
    outputs = step(*columns)
    return {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}, outputs


def test_accumulation_gives_the_gradients_of_the_whole_batch(golden, unpacked_columns):
    """8 rows at once, and 4 parts of 2 rows; the pairs' numbers of tokens differ between parts."""
    whole, outputs = gradients_of(golden, unpacked_columns, accumulation=1)
    parts, part_outputs = gradients_of(golden, unpacked_columns, accumulation=4)
    for name, gradient in whole.items():
        np.testing.assert_allclose(
            parts[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )
    np.testing.assert_allclose(
        part_outputs[5].asnumpy(), outputs[5].asnumpy(), rtol=1e-5, atol=1e-4
    )  # sums
    assert part_outputs[7].shape == outputs[7].shape == (8, 1)


def test_packed_rows_give_the_gradients_of_unpacked_ones(golden, expected, unpacked_columns):
    from test_glm4_dpo import columns, token_pairs

    pairs, references = token_pairs(expected), preferences(expected)
    rows = mindrecord.make_rows(pairs, references, seq_len=SEQ_LEN, pad_id=316)
    assert len(rows) < len(pairs)
    packed, _ = gradients_of(golden, columns(rows), accumulation=1)
    unpacked, _ = gradients_of(golden, unpacked_columns, accumulation=1)
    for name, gradient in unpacked.items():
        np.testing.assert_allclose(
            packed[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


@pytest.fixture(scope="module")
def first_moments(golden, two_workers):
    """Adam's first moment after one step, a tenth of the gradient: of two workers with a row each,
    one with two rows, and one with a row and accumulation 2.
    """
    config = training_yaml(golden.folder, "accumulated", shuffle=False, sft_weight=1.0)
    config.write_text(
        config.read_text().replace(
            "batch_size: 1}", "batch_size: 1, gradient_accumulation_steps: 2}"
        )
    )
    output = golden.folder / "run_accumulated"
    result = run_script(RUN_DPO, *arguments(golden, config, output))
    assert result.returncode == 0, result.stderr
    found = {}
    for name, folder in (*two_workers.items(), ("accumulated", output)):
        stored = containers.open_tensors(folder / "checkpoint/rank_0/glm4_dpo-step_00000001.ckpt")
        found[name] = {
            key: tensor.array()
            for key, tensor in stored.items()
            if key.startswith(("exp_avg.", "adam_m."))
        }
        assert len(found[name]) == 24
    return found


@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_workers_and_accumulation_give_the_gradients_of_one_batch(first_moments, name):
    for key, expected in first_moments["one"].items():
        np.testing.assert_allclose(
            first_moments[name][key],
            expected,
            rtol=0,
            atol=1e-5 * np.abs(expected).max(),
            err_msg=key,
        )


def test_weight_decay_leaves_norms_and_biases(golden):
    from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters

    groups = get_optimizer_grouped_parameters(load_model(golden, "finetune"), 0.1)
    by_decay = {
        group["weight_decay"]: [parameter.name for parameter in group["params"]] for group in groups
    }
    assert set(by_decay) == {0.1, 0.0}
    assert all("layernorm" in name or name.endswith("bias") for name in by_decay[0.0])
    assert not any("layernorm" in name or name.endswith("bias") for name in by_decay[0.1])


def test_pairs_without_a_finite_loss_stop_the_run_and_are_named(golden, tmp_path):
    """Pair 5's reference log-prob is infinite. All rows are one batch, one per epoch."""
    from mindspore.mindrecord import FileReader

    rows = [
        {name: np.asarray(row[name]) for name in COLUMNS}
        for row in FileReader(str(golden.data)).get_next()
    ]
    for row in rows:
        answer = row["chosen"][row["pair_ids"] == 5]
        row["reference_logps"] = row["reference_logps"].copy()
        row["reference_logps"][answer] = -np.inf
    sidecar = mindrecord.read_data_sidecar(golden.data)
    data = tmp_path / "bad.mindrecord"
    mindrecord.write_rows(data, rows, sidecar)
    config = training_yaml(golden.folder, "bad", batch_size=3, check=False)
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 9"))
    result = run_script(RUN_DPO, *arguments(golden, config, tmp_path / "out", data=data))
    assert_one_error(
        result,
        "step 3: the loss of pair(s) 5 (counted from 0 in the source) is not finite, for 3 step(s)",
    )
    assert result.stdout.count("OVERFLOW, step skipped") == 3
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [step["overflow_steps"] for step in steps] == [1, 2, 3]


def test_max_steps_ends_training_and_the_schedule(golden, tmp_path):
    config = training_yaml(golden.folder, "short")
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 2, max_steps: 2"))
    result = run_script(RUN_DPO, *arguments(golden, config, tmp_path))
    assert result.returncode == 0, result.stderr
    rates = [step["learning_rate"] for step in records(tmp_path)]
    assert rates == pytest.approx(
        [1e-3, 5e-4], rel=1e-3
    )  # cosine over 2 steps: cos(0), cos(pi / 2)
    assert (tmp_path / "checkpoint_network/rank_0/glm4_dpo-network.ckpt").exists()


def test_the_best_weights_are_kept_by_the_named_metric(golden, tmp_path):
    """Evaluation after each step, best by margin; the file is that of the best step, as its state
    says.
    """
    config = training_yaml(golden.folder, "best")
    config.write_text(
        config.read_text().replace(
            "eval_step_interval: 0", "eval_step_interval: 1, best_metric: rewards/margins"
        )
    )
    result = run_script(
        RUN_DPO, *arguments(golden, config, tmp_path, more=["--eval_dataset", golden.data])
    )
    assert result.returncode == 0, result.stderr
    margins = [record["rewards/margins"] for record in records(tmp_path, "eval")]
    assert len(margins) == 7
    best = 1 + int(np.argmax(margins[1:]))
    kept = containers.open_tensors(tmp_path / "checkpoint_best/rank_0/glm4_dpo-best.ckpt")
    state = containers.open_tensors(tmp_path / f"checkpoint/rank_0/glm4_dpo-step_{best:08d}.ckpt")
    assert all(np.array_equal(tensor.array(), state[name].array()) for name, tensor in kept.items())
