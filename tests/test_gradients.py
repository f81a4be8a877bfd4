"""Gradients of the loss for every parameter, against PyTorch's (tests/golden/make_gradients.py)."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, SEQ_LEN, load_model
from safetensors.numpy import load_file
from test_glm4_dpo import columns, token_pairs

from mindrlhf import runtime
from mindrlhf.data import mindrecord
from mindrlhf.models.glm4 import model_config, weight_names

TOLERANCE = 1e-4  # of the largest element of each gradient


@pytest.fixture(scope="module")
def pytorch():
    return load_file(GOLDEN / "gradients.safetensors")


def batch(expected, pytorch):
    """Columns of all 8 pairs, packed, with the file's references, and the weights of a mean over
    pairs and tokens.
    """
    pairs = token_pairs(expected)
    references = np.stack([pytorch[f"{side}_ref_logps"] for side in ("chosen", "rejected")], 1)
    rows = mindrecord.make_rows(pairs, references, seq_len=SEQ_LEN, pad_id=316)
    tokens = sum(len(pair.chosen) for pair in pairs)
    weights = ms.Tensor(np.tile([[1 / len(pairs), 1 / tokens]], (len(rows), 1)), ms.float32)
    return tuple(columns(rows)), weights


@pytest.mark.parametrize(
    ("sft_weight", "chunk", "plan", "flash"),
    [  # 1152 positions: the last chunk is shorter
        (0.0, 0, False, False),
        (1.0, 200, False, False),
        (1.0, 200, True, False),
        (1.0, 200, False, True),
        (0.0, 200, True, True),
    ],
    ids=[
        "plain",
        "blocks",
        "cells of a parallel plan",
        "flash attention on one NPU",
        "flash attention in a plan",
    ],
)
def test_gradient_of_every_parameter_is_pytorchs(
    golden, expected, pytorch, sft_weight, chunk, plan, flash, monkeypatch
):
    monkeypatch.setattr(
        runtime, "is_sharded", lambda: plan
    )  # MindFormers' own cells, log-probs for a spread vocabulary
    network = load_model(
        golden,
        "finetune",
        {
            "dpo.sft_weight": sft_weight,
            "dpo.logps_chunk_size": chunk,
            "model.model_config.use_flash_attention": flash,
        },
    )
    parameters = network.set_train().trainable_params()
    (loss, _, _), gradients = ms.value_and_grad(network, None, parameters, has_aux=True)(
        *batch(expected, pytorch)
    )
    dpo, sft = pytorch["losses"]
    assert float(loss) == pytest.approx(dpo + sft_weight * sft, rel=1e-5)

    config = json.loads((GOLDEN / "hf_glm/config.json").read_text())
    numbers = model_config.parse_hf_config(config, "config.json")
    assert [parameter.name for parameter in parameters] == list(
        weight_names.parameter_shapes(numbers)
    )
    parts, seen = weight_names.hf_parts(numbers, "glm"), 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        begin = 0
        for name, shape in parts[parameter.name]:
            wanted = pytorch[f"dpo/{name}"]
            found = gradient.asnumpy()[begin : begin + shape[0]]
            if sft_weight:  # of the SFT part the file has every 8th row
                wanted, found = wanted[::8] + sft_weight * pytorch[f"sft/{name}"], found[::8]
            np.testing.assert_allclose(
                found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=name
            )
            begin += shape[0]
            seen += 1
    assert seen == len([name for name in pytorch if name.startswith("dpo/")])
