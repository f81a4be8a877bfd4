"""The check of a machine: it passes on this one, and fails where something is wrong."""
import json
import re

import numpy as np
import pytest
from conftest import GOLDEN
from mindspore import ops

from mindrlhf import check, cli
from mindrlhf.models.glm4 import weights
from mindrlhf.models.glm4.dpo import Glm4DPO
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer


def run(capsys, monkeypatch, *, training=False):
    """Lines of the screen and the exit status. The training steps, which cost most, only if asked for."""
    if not training:
        monkeypatch.setattr(check, "check_training", lambda *_: None)
    try:
        check.main(["--device_target", "CPU"])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return capsys.readouterr().out.splitlines(), status


def failed(lines):
    """What failed, without how far off it was."""
    return [re.split("  +", line.strip())[1] for line in lines if line.strip().startswith("FAIL  ")]


def test_it_passes_here_in_the_settings_of_the_tiny_model(capsys, monkeypatch):
    lines, status = run(capsys, monkeypatch, training=True)
    assert status == 0, "\n".join(lines)
    assert lines[-1].startswith("PASS after")
    assert len([line for line in lines if line.startswith("  pass")]) == 10
    (found,) = re.findall(r"log-probs of 16 answers +off by (\S+) nats \(allowed: 0.0003\)", "\n".join(lines))
    assert 0 < float(found) < 3e-4


def hide_nothing(self, segment_ids):
    """In place of Glm4DPO.attention_mask."""
    rows, length = segment_ids.shape
    return ops.zeros((rows, 1, length, length), self.mask_dtype)


def test_a_mask_that_hides_nothing_fails(capsys, monkeypatch):
    monkeypatch.setattr(Glm4DPO, "attention_mask", hide_nothing)
    lines, status = run(capsys, monkeypatch)
    assert status == 1
    assert failed(lines) == ["PyTorch's log-probs of 16 answers", "attention does not see what comes later",
                             "attention does not see another pair of the row"]
    assert lines[-1].startswith("FAIL after")


def test_wrong_weights_fail(capsys, monkeypatch):
    load = check.build

    def build(settings, weights):
        network = load(settings, weights)
        weight = network.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight
        weight.set_data(weight * 1.001)
        return network

    monkeypatch.setattr(check, "build", build)
    lines, status = run(capsys, monkeypatch)
    assert status == 1
    assert failed(lines) == ["PyTorch's log-probs of 16 answers"]


def test_the_settings_of_9b_but_for_what_needs_an_npu(capsys, tmp_path):
    """The second way of an NPU, with float32 and plain attention."""
    way = check.WAYS["Ascend"][1]
    changes = {f"model.model_config.{key}": value for key, value in (
        ("compute_dtype", "float32"), ("param_init_type", "float32"), ("use_flash_attention", False))}
    way = check.Way("9b", way.yaml, logps=3e-4, loss=1e-4, norm=1e-4,
                    changes={**way.changes, **changes, "runner_config.sink_mode": False})
    report = check.Report()
    check.check_way(report, way, "CPU", *check.convert(tmp_path), Glm4Tokenizer(GOLDEN / "tokenizer.model"))
    assert report.passed, capsys.readouterr().out


def test_what_an_npu_computes_is_what_9b_computes():
    numbers = weights.read_numbers(json.loads((GOLDEN / "hf_glm/config.json").read_text()), "config.json")
    tokenizer = Glm4Tokenizer(GOLDEN / "tokenizer.model")
    for mode, kept in (("preprocess", "bfloat16"), ("finetune", "float32")):
        settings = check.load_settings(check.WAYS["Ascend"][1], mode, "Ascend", tokenizer, numbers)
        model = settings["model"]["model_config"]
        assert model["compute_dtype"] == "bfloat16"
        assert model["param_init_type"] == kept
        assert model["use_flash_attention"]
        assert model["seq_length"] % 16 == model["kv_channels"] % 16 == 0  # what flash attention takes


def test_a_number_that_is_none_fails(capsys):
    report = check.Report()
    report.off("x", np.float32("nan"), 1.0, "nats")
    assert not report.passed
    report = check.Report()
    with report.guard("computes"):
        raise RuntimeError("no kernel\nsecond line")
    assert not report.passed
    assert "FAIL  computes" in (out := capsys.readouterr().out)
    assert "RuntimeError: no kernel\n" in out


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(cli.UserError, match="Ascend: this MindSpore cannot use it"):
        check.main([])
