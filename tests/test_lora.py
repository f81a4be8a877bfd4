"""LoRA on the golden case: what is trained, saved, merged and refused."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import RUN_DPO, SEQ_LEN, arguments, load_model, records, run_script, write_overlay
from test_glm4_dpo import Logits

from mindrlhf import config
from mindrlhf.checkpoints import containers
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import load, lora, weight_names

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["qkv", "dense", "mlp"]}
MORE = """
lora: {rank: 4, alpha: 8, dropout: 0.0, target_modules: [qkv, dense, mlp]}
dpo: {sft_weight: 0.0}
runner_config: {epochs: 1, batch_size: 1}
lr_schedule: {learning_rate: 1e-2, warmup_ratio: 0.0}
callbacks:
  - {type: DPOMonitor}
  - {type: EvalMonitor}
  - {type: DPOCheckpointMonitor, prefix: glm4_dpo, save_checkpoint_steps: 2, keep_checkpoint_max: 9}
"""


@pytest.fixture(scope="module")
def trained(golden):
    output = golden.folder / "lora"
    config_file = write_overlay(golden.folder / "lora.yaml", "finetune", MORE)
    result = run_script(
        RUN_DPO, *arguments(golden, config_file, output, more=["--eval_dataset", golden.data])
    )
    assert result.returncode == 0, result.stderr
    return output, config_file


def adapter_file(output):
    return output / "checkpoint_network/rank_0/glm4_dpo-network.ckpt"


def test_it_starts_at_the_reference_and_learns(trained):
    assert records(trained[0])[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-4)
    before, after = records(trained[0], "eval")
    assert after["rewards/margins"] > before["rewards/margins"] + 0.5


def test_only_adapters_are_saved(trained, golden):
    """3 layers of A (4, in), B (out, 4): qkv 96 -> 160, dense 96 -> 96, mlp 96 -> 320, 160 -> 96"""
    stored = containers.open_tensors(adapter_file(trained[0]))
    adapters = {name: tensor for name, tensor in stored.items() if weight_names.is_adapter(name)}
    assert set(stored) - set(adapters) == {"lora_rank", "lora_alpha"}
    assert len(adapters) == 3 * 4 * 2
    assert sum(np.prod(t.shape) for t in adapters.values()) == 3 * 4 * (
        (96 + 160) + (96 + 96) + (96 + 320) + (160 + 96)
    )
    state = containers.open_tensors(trained[0] / "checkpoint/rank_0/glm4_dpo-step_00000002.ckpt")
    assert not any(weight_names.is_base_weight(name) for name in state)


def test_a_resumed_run_needs_its_base_weights(golden, tmp_path, monkeypatch):
    """Its states have adapters only. Before: a checkpoint in the current folder was taken."""
    from mindrlhf import config
    from mindrlhf.training import run as training

    assert config.find_checkpoint("") == ""
    settings = config.load_settings(golden.finetune, run_mode="finetune")
    settings |= {"resume_training": "auto", "output_dir": str(tmp_path), "lora": {"rank": 2}}
    monkeypatch.setattr(training, "open_data", lambda _: None)
    monkeypatch.setattr(training, "open_state", lambda _: tmp_path / "a state")
    with pytest.raises(UserError, match="no weights given"):
        training.finetune(settings)


def test_a_resumed_run_goes_on_as_the_unbroken_one(trained, golden, tmp_path):
    output, config_file = trained
    state = output / "checkpoint/rank_0/glm4_dpo-step_00000002.ckpt"
    result = run_script(
        RUN_DPO,
        *arguments(
            golden, config_file, tmp_path, more=["--resume", state, "--eval_dataset", golden.data]
        ),
    )
    assert result.returncode == 0, result.stderr
    for key in ("loss", "rewards/margins", "grad_norm", "learning_rate"):
        assert records(tmp_path)[0][key] == records(output)[2][key]


@pytest.fixture(scope="module")
def unmerged(golden, trained):
    """The training network with its adapters loaded."""
    network = load_model(golden, "finetune").set_train(False)
    lora.add_adapters(network, LORA, compute_dtype="float32", seed=1)
    load.load_weights(
        network, adapter_file(trained[0]), names=weight_names.is_adapter, training_state=True
    )
    return network


def logits(network):
    positions = np.arange(SEQ_LEN, dtype=np.int32).reshape(1, -1)
    ids = np.random.default_rng(0).integers(0, 330, positions.shape).astype(np.int32)
    layout = np.ones_like(ids), np.zeros_like(ids), positions
    return Logits(network)(*map(ms.Tensor, (ids, *layout))).asnumpy()


def test_the_card_takes_only_the_merge_of_its_adapters(golden, trained, tmp_path):
    import transform_checkpoint
    from mindrlhf.card import add, record

    card = tmp_path / "out/card"
    shutil.copytree(trained[0], card.parent)
    merged = tmp_path / "merged.ckpt"
    transform_checkpoint.main(
        ["--src_checkpoint", str(card.parent / "checkpoint_network"), "--base_checkpoint",
         str(golden.checkpoint), "--dst_checkpoint", str(merged)]
    )  # fmt: skip
    add.main([str(card), "--checkpoint", str(merged)])
    assert record.read_card(card)["result"]["merged"]["weights"] == "checkpoint_network"
    with pytest.raises(UserError, match="holds other weights than"):
        add.main([str(card), "--checkpoint", str(golden.checkpoint)])
    assert record.read_card(card)["plan"]["lora"]["rank"] == 4


def test_merged_and_unmerged_logits_agree(golden, trained, unmerged, tmp_path):
    import transform_checkpoint

    transform_checkpoint.main(
        [
            "--src_checkpoint",
            str(trained[0] / "checkpoint_network"),
            "--base_checkpoint",
            str(golden.checkpoint),
            "--dst_checkpoint",
            str(tmp_path / "merged.ckpt"),
        ]
    )
    network = load_model(golden, "finetune").set_train(False)
    base = logits(network)
    load.load_weights(network, tmp_path / "merged.ckpt")
    merged = logits(network)
    assert np.abs(merged - logits(unmerged)).max() < 1e-5 * np.abs(merged).max()
    assert np.abs(merged - base).max() > 0.1  # the adapters do something


def test_by_hand(golden, trained):
    """W + alpha / rank * B A, for one matrix."""
    base, stored = (
        containers.open_tensors(golden.checkpoint),
        containers.open_tensors(adapter_file(trained[0])),
    )
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h"
    a, b = (stored[f"{name}.mindpet_delta_lora_{half}"].float32() for half in "ab")
    expected = base[f"{name}.weight"].float32() + 2.0 * np.einsum("or,ri->oi", b, a)
    np.testing.assert_allclose(
        lora.merge_adapters(base, stored, "x")[f"{name}.weight"](), expected, atol=1e-6
    )


def test_predict_takes_base_and_adapters(golden, trained, tmp_path):
    options = [
        "--config",
        golden.predict,
        "--load_checkpoint",
        golden.checkpoint,
        "--vocab_file",
        golden.tokenizer,
        "--predict_data",
        "旅行?",
    ]
    plain = run_script(RUN_DPO, *options)
    adapted = run_script(
        RUN_DPO, *options, "--adapter_checkpoint", trained[0] / "checkpoint_network"
    )
    assert plain.returncode == adapted.returncode == 0, adapted.stderr
    assert plain.stdout != adapted.stdout
    both = run_script(
        RUN_DPO,
        *options,
        *("--adapter_checkpoint", trained[0] / "checkpoint_network"),
        *("--compare_with", "base", "--output", tmp_path / "both"),
    )
    assert both.returncode == 0, both.stderr
    row = json.loads((tmp_path / "both.jsonl").read_text())
    assert [row["answer"] + "\n", row["other_answer"] + "\n"] == [adapted.stdout, plain.stdout]


def test_only_adapters_are_trained(unmerged):
    assert all(weight_names.is_adapter(parameter.name) for parameter in unmerged.trainable_params())
    assert len(unmerged.trainable_params()) == 24


def test_target_modules_are_a_choice(golden):
    network = load_model(golden, "finetune")
    lora.add_adapters(
        network, {**LORA, "target_modules": ["dense"]}, compute_dtype="float32", seed=1
    )
    names = {parameter.name for parameter in network.trainable_params()}
    assert len(names) == 3 * 2
    assert all(".self_attention.dense." in name for name in names)


def test_files_that_do_not_belong_together_are_refused(golden, trained, tmp_path):
    import transform_checkpoint

    base, stored = (
        containers.open_tensors(golden.checkpoint),
        containers.open_tensors(adapter_file(trained[0])),
    )
    with pytest.raises(UserError, match="holds no adapters"):
        lora.merge_adapters(base, base, "x")
    with pytest.raises(UserError, match="does not fit the base"):
        lora.merge_adapters({}, stored, "x")
    half = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith("layers.0.mlp.dense_4h_to_h" + weight_names.LORA_B)
    }
    with pytest.raises(UserError, match="lacks its other matrix"):
        lora.merge_adapters(base, half, "x")
    with pytest.raises(UserError, match="holds full weights, no adapters"):
        transform_checkpoint.main(
            [
                "--src_checkpoint",
                str(golden.checkpoint),
                "--base_checkpoint",
                str(golden.checkpoint),
                "--dst_checkpoint",
                str(tmp_path / "x"),
            ]
        )


def test_one_adapter_file_says_what_the_folder_says(golden, trained, tmp_path, capsys):
    import transform_checkpoint

    folder, target = trained[0] / "checkpoint_network", tmp_path / "adapters.safetensors"
    transform_checkpoint.main(["--src_checkpoint", str(folder), "--dst_checkpoint", str(target)])
    assert "these are LoRA adapters alone" in capsys.readouterr().out
    base = containers.open_tensors(golden.checkpoint)
    changed = [
        lora.merge_adapters(base, load.open_adapters(path), path)
        for path in (folder, target, adapter_file(trained[0]))
    ]
    assert len(changed[0]) == 12
    for name, make in changed[0].items():
        for other in changed[1:]:
            assert np.array_equal(make(), other[name]())


def test_adapters_and_what_they_are_added_to_are_computed_in_the_type_of_the_yaml(golden):
    """MindFormers 1.3.0 would use float16 for both; CPU tests of float32 log-probs would fail."""
    network = load_model(golden, "finetune")
    lora.add_adapters(network, LORA, compute_dtype="float32", seed=1)
    cell = network.transformer.encoder.layers[0].mlp.dense_4h_to_h
    assert {parameter.dtype for parameter in network.trainable_params()} == {ms.float32}
    assert cell.dtype == ms.float32
    x = np.random.default_rng(0).standard_normal((5, 160)).astype(np.float32)
    found = cell(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(
        found, x @ cell.weight.asnumpy().T, atol=1e-5
    )  # B is 0; float16 is off by 1e-3


def test_adapters_start_alike_whatever_the_plan():
    """A lies within 1 / sqrt(in) and depends on name and seed alone; B is 0."""
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h"
    a = lora.initial_values(name + weight_names.LORA_A, (4, 10000), 1)
    assert np.array_equal(a, lora.initial_values(name + weight_names.LORA_A, (4, 10000), 1))
    assert not np.array_equal(a, lora.initial_values(name + weight_names.LORA_A, (4, 10000), 2))
    assert not np.array_equal(
        a, lora.initial_values(name.replace("0", "1") + weight_names.LORA_A, (4, 10000), 1)
    )
    assert np.abs(a).max() <= 0.01
    assert a.std() == pytest.approx(0.01 / np.sqrt(3), rel=0.02)
    assert not lora.initial_values(name + weight_names.LORA_B, (10000, 4), 1).any()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora: {rank: 4}", "lora needs rank, alpha, dropout and target_modules"),
        (
            "lora: {rank: 4, alpha: 8, dropout: 0.0, target_modules: []}",
            "needs at least one of qkv, dense, mlp",
        ),
        ("lora: {rank: 0, alpha: 8, dropout: 0.0, target_modules: [qkv]}", "lora.rank"),
        ("lora: {rank: 4, alpha: 8, dropout: 0.0, target_modules: [head]}", "lora.target_modules"),
    ],
)
def test_settings_are_checked(tmp_path, text, part):
    path = write_overlay(tmp_path / "x.yaml", "finetune", text)
    with pytest.raises(UserError, match=part):
        config.load_settings(path, run_mode="finetune")


def test_adapters_leave_the_network_as_it_was_at_first(golden):
    network = load_model(golden, "finetune").set_train(False)
    before = logits(network)
    lora.add_adapters(network, LORA, compute_dtype="float32", seed=1)
    assert np.array_equal(before, logits(network))
