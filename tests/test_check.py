"""The check of a machine: it passes on this one, and fails where something is wrong."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mindspore import ops

from mindrlhf import check, cli
from mindrlhf.models.glm4.network import Glm4DPO


def run(capsys, monkeypatch, *, training=False):
    """Printed lines and the exit status. The training steps, the slowest part, are optional."""
    if not training:
        monkeypatch.setattr(check, "check_training", lambda *_: None)
        monkeypatch.setattr(check, "check_lora", lambda *_: None)
        monkeypatch.setitem(check.PRECISIONS, "CPU", check.PRECISIONS["CPU"][:1])
    try:
        check.main(["--device_target", "CPU", "--workers", "1"])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return capsys.readouterr().out.splitlines(), status


def failed(lines):
    """Names of the failed checks, without their errors."""
    return [re.split("  +", line.strip())[1] for line in lines if line.strip().startswith("FAIL  ")]


def test_it_passes_here_in_the_settings_of_the_tiny_model(capsys, monkeypatch):
    lines, status = run(capsys, monkeypatch, training=True)
    assert status == 0, "\n".join(lines)
    assert lines[-1].startswith("PASS after")
    assert len([line for line in lines if line.startswith("  pass")]) == 1 + 2 * 13
    found = re.findall(
        r"log-probs of 16 answers are PyTorch's +off by (\S+) nats \(allowed: 0.0003\)",
        "\n".join(lines),
    )
    assert len(found) == 2
    assert all(0 < float(number) < 3e-4 for number in found)


def hide_nothing(self, group_ids, answer_ids):
    """In place of Glm4DPO.attention_mask."""
    rows, length = group_ids.shape
    return ops.zeros((rows, 1, length, length), self.mask_dtype)


def test_a_mask_that_hides_nothing_fails(capsys, monkeypatch):
    monkeypatch.setattr(Glm4DPO, "attention_mask", hide_nothing)
    lines, status = run(capsys, monkeypatch)
    assert status == 1
    assert failed(lines) == [
        "log-probs of 16 answers are PyTorch's",
        "attention does not see later tokens",
        "attention does not see the other answer",
        "attention does not see the other group in the row",
    ]
    assert lines[-1].startswith("FAIL after")


def test_wrong_weights_fail(capsys, monkeypatch):
    load = check.build_and_load

    def build(settings, weights, **options):
        network = load(settings, weights, **options)
        weight = network.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight
        weight.set_data(weight * 1.001)
        return network

    monkeypatch.setattr(check, "build_and_load", build)
    lines, status = run(capsys, monkeypatch)
    assert status == 1
    assert failed(lines) == ["log-probs of 16 answers are PyTorch's"]


@pytest.mark.parametrize("fault", ["float16", "no masks"])
def test_lora_in_another_type_than_the_yaml_says_fails(capsys, monkeypatch, tmp_path, fault):
    """MindFormers 1.3.0 defaults to float16 for adapters and the products they are added to."""
    from mindrlhf.models.glm4 import lora

    add = lora.add_adapters
    if fault == "float16":
        monkeypatch.setattr(
            lora,
            "add_adapters",
            lambda network, section, **options: add(
                network, section, **{**options, "compute_dtype": "float16"}
            ),
        )
    else:
        monkeypatch.setattr(Glm4DPO, "attention_mask", hide_nothing)
    report, precision = check.Checklist(), check.PRECISIONS["CPU"][0]
    golden_case = check.open_golden(tmp_path)
    settings = check.golden_settings(precision, "finetune", "CPU", golden_case)
    check.check_lora(report, precision, settings, golden_case, golden_case.logps)
    assert not report.passed
    wrong = failed(capsys.readouterr().out.splitlines())
    assert wrong[0] == (
        "LoRA: adapters in float32, products in float32"
        if fault == "float16"
        else "LoRA: loss of the first step is ln 2"
    )


def test_two_workers_rehearse_the_commands(capsys, monkeypatch, tmp_path):
    """What the rehearsal gets, and that its failure makes the check fail. test_rig.py tests the
    rehearsal itself.
    """
    seen = []

    def rehearse(command, **options):
        seen.append((command, options["env"]["DEVICE"], Path(command[2]).read_text()))
        return subprocess.CompletedProcess(command, len(seen) - 1, "first\nlast line\n", "")

    monkeypatch.setattr(check.subprocess, "run", rehearse)
    report = check.Checklist()
    check.check_commands(report, "Ascend", tmp_path)
    assert report.passed
    command, device, plan = seen[0]
    assert command[1].endswith("scripts/rehearse.sh")
    assert command[3] == "2"
    assert device == "Ascend"
    assert "finetune_glm4_9b.yaml" in plan
    assert "model_parallel: 2" in plan
    check.check_commands(report, "CPU", tmp_path)
    assert not report.passed
    assert "FAIL  plan, sink mode, save, resume, merge, KV cache" in capsys.readouterr().out


def test_what_an_npu_computes_is_what_9b_computes(tmp_path):
    golden_case = check.open_golden(tmp_path)
    for mode, kept in (("preprocess", "bfloat16"), ("finetune", "float32")):
        settings = check.golden_settings(check.PRECISIONS["Ascend"][1], mode, "Ascend", golden_case)
        model = settings["model"]["model_config"]
        assert model["compute_dtype"] == "bfloat16"
        assert model["param_init_type"] == kept
        assert model["use_flash_attention"]
        assert model["seq_length"] % 16 == 0  # what flash attention takes
        assert 64 <= model["kv_channels"] <= 256
        assert settings["dpo"]["logps_chunk_size"] < check.SEQ_LEN  # several chunks


def test_a_number_that_is_none_fails(capsys):
    report = check.Checklist()
    report.off("x", np.float32("nan"), 1.0, "nats")
    assert not report.passed
    report = check.Checklist()
    with report.guard("computes"):
        raise RuntimeError("no kernel\nsecond line")
    assert not report.passed
    assert "FAIL  computes" in (out := capsys.readouterr().out)
    assert "RuntimeError: no kernel\n" in out


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(cli.UserError, match="Ascend: this MindSpore cannot use it"):
        check.main([])
