"""GLM-4's config and names: config.json in all spellings, the table of the 9B model, sidecars and
YAMLs.
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import EXAMPLE, GOLDEN, ROOT, write_overlay

from mindrlhf import config
from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.checkpoints.tensors import TensorItem
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names

BASE = {
    layout: json.loads((GOLDEN / f"hf_{layout}" / "config.json").read_text())
    for layout in ("glm", "chatglm")
}
NUMBERS = model_config.parse_hf_config(BASE["glm"], "config.json")
NINE = model_config.ModelConfig(
    num_layers=40,
    padded_vocab_size=151552,
    hidden_size=4096,
    ffn_hidden_size=13696,
    num_attention_heads=32,
    multi_query_group_num=2,
    kv_channels=128,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=500,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
)


def without(config_json, *keys):
    """A config.json that lacks some keys."""
    return {key: value for key, value in config_json.items() if key not in keys}


# config.json


def test_both_spellings_say_the_same():
    """Values read from the golden files by eye."""
    assert (
        NUMBERS
        == model_config.parse_hf_config(BASE["chatglm"], "config.json")
        == model_config.ModelConfig(
            num_layers=3,
            padded_vocab_size=330,
            hidden_size=96,
            ffn_hidden_size=160,
            num_attention_heads=6,
            multi_query_group_num=2,
            kv_channels=16,
            layernorm_epsilon=1.5625e-07,
            rope_ratio=500,
            eos_token_id=(316, 323, 325),
            pad_token_id=316,
            max_position_embeddings=1024,
        )
    )


@pytest.mark.parametrize("ratio", [1, 500, 10000])
def test_rope_in_every_spelling(ratio):
    """The base of the rotary embedding is 10000 * rope_ratio; none given means 10000."""
    theta = 10000.0 * ratio
    glm, chatglm = without(BASE["glm"], "rope_parameters"), without(BASE["chatglm"], "rope_ratio")
    ways = [
        {
            **glm,
            "rope_parameters": {
                "rope_theta": theta,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            },
        },
        {**glm, "rope_theta": theta, "partial_rotary_factor": 0.5},
        {**glm, "rope_theta": int(theta)},
        {**glm, "rope_theta": theta, "rope_scaling": None},
        {**chatglm, "rope_ratio": ratio},
        {**chatglm, "rope_ratio": float(ratio), "rope_theta": theta},
    ]
    if ratio == 1:
        ways += [glm, chatglm]
    for way in ways:
        found = model_config.parse_hf_config(way, "config.json").rope_ratio
        assert found == ratio
        assert isinstance(found, int)


@pytest.mark.parametrize("layout", ["glm", "chatglm"])
@pytest.mark.parametrize("ratio", [1, 500, 10000, 2.5])
def test_what_is_written_reads_back(layout, ratio):
    numbers = replace(NUMBERS, rope_ratio=ratio, max_position_embeddings=77)
    assert (
        model_config.parse_hf_config(hf.config_json(numbers, layout, "BF16"), "config.json")
        == numbers
    )


@pytest.mark.parametrize("layout", ["glm", "chatglm"])
def test_what_is_written_says_what_the_golden_config_says(layout):
    """Keys that transformers wrote, or the original repository has, have the same values here."""
    written = hf.config_json(NUMBERS, layout, {"glm": "F32", "chatglm": "BF16"}[layout])
    known = {
        **BASE[layout],
        "torch_dtype": BASE[layout].get("dtype", BASE[layout].get("torch_dtype")),
    }
    left_out = {"dtype", "transformers_version", "bos_token_id"}
    assert {key: written.get(key) for key in known if key not in left_out} == without(
        known, *left_out
    )


def test_one_stop_token_may_stand_alone():
    assert model_config.parse_hf_config(
        {**BASE["glm"], "eos_token_id": 316}, "config.json"
    ).eos_token_id == (316,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"model_type": "glm4"}, "model_type is 'glm4'"),
        ({"num_hidden_layers": None}, "num_hidden_layers or num_layers is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
        ({"hidden_size": "96"}, "hidden_size is '96'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_attention_heads": 7}, "7 attention heads are no multiple of 2"),
        ({"num_layers": 4}, "num_hidden_layers is 3 but num_layers is 4"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is [1, -1]"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"pad_token_id": [3]}, "pad_token_id is [3]"),
        ({"rope_ratio": 1}, "rope_parameters.rope_theta is 5000000.0 but rope_ratio is 1"),
        ({"rope_parameters": 5}, "rope_parameters is 5"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta is True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor is 1.0"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type is 'linear'",
        ),
    ],
)
def test_another_model_is_refused(change, said):
    with pytest.raises(UserError) as error:
        model_config.parse_hf_config({**BASE["glm"], **change}, "config.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        model_config.parse_hf_config(
            {**BASE["glm"], "tie_word_embeddings": True, "hidden_size": -1, "head_dim": None},
            "file",
        )
    for said in ("tie_word_embeddings", "hidden_size is -1", "head_dim or kv_channels is missing"):
        assert said in str(error.value)


# names and shapes


@pytest.mark.parametrize("layout", ["glm", "chatglm"])
def test_names_and_shapes_are_those_of_the_golden_files(layout):
    found = {}
    for path in (GOLDEN / f"hf_{layout}").glob("*.safetensors"):
        content = path.read_bytes()
        found |= json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found = {
        name: tuple(entry["shape"])
        for name, entry in found.items()
        if name not in ("__metadata__", weight_names.INV_FREQ)
    }
    assert weight_names.hf_shapes(NUMBERS, layout) == found


def test_the_9b_model_has_its_published_size():
    """2 * 151552 * 4096 for the vocabulary; a layer: norms 2 * 4096, qkv (4096 + 2 * 256) * (4096 +
    1), dense 4096 ** 2, mlp 3 * 4096 * 13696; 40 layers, and a norm.
    """
    by_hand = 2 * 151552 * 4096 + 4096 + 40 * (2 * 4096 + 4608 * 4097 + 4096**2 + 3 * 4096 * 13696)
    assert by_hand == 9_399_951_360
    for shapes in (
        weight_names.parameter_shapes(NINE),
        weight_names.hf_shapes(NINE, "glm"),
        weight_names.hf_shapes(NINE, "chatglm"),
    ):
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == by_hand


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from mindrlhf import config, runtime
from mindrlhf.models.glm4 import build
from mindspore.nn.utils import no_init_parameters
settings = config.load_settings(sys.argv[2], run_mode="preprocess", overrides={
    "context": {"mode": 0, "device_target": "CPU"}, "model.model_config.use_flash_attention": False,
    "model.model_config.seq_length": 16, "model.model_config.compute_dtype": "float32",
    "model.model_config.param_init_type": "float32"})
run = config.to_mindformers(settings)
runtime.start_device(run, parallel=False)
memory = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = memory()
with no_init_parameters():
    network = build.build_network(run)
shapes = {parameter.name: parameter.shape for parameter in network.get_parameters()}
print(json.dumps([type(network).__name__, memory() - before, shapes]))
"""


def test_the_9b_table_is_that_of_glm4dpo():
    """The network of the 9B YAML, changed only for the CPU; its 37.6 GB are never allocated."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT), str(EXAMPLE / "process_glm4_9b.yaml")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    kind, kilobytes, found = json.loads(result.stdout.splitlines()[-1])
    assert kind == "Glm4DPO"
    assert {name: tuple(shape) for name, shape in found.items()} == weight_names.parameter_shapes(
        NINE
    )
    assert kilobytes < 1_000_000


# sidecars


@pytest.fixture
def tiny():
    """Settings of predict_glm4_tiny.yaml, and the ModelConfig that fits them."""
    settings = config.load_settings(EXAMPLE / "predict_glm4_tiny.yaml", run_mode="predict")
    model = settings["model"]["model_config"]
    return settings, replace(NUMBERS, **{name: model[name] for name in sidecar.IN_YAML})


def write_weights(path, numbers, described=True, seed=0):
    """A random checkpoint, with its sidecar or without."""
    random = np.random.default_rng(seed)
    identity = containers.write_tensors(
        path,
        [
            TensorItem(
                name, "F32", shape, lambda shape=shape: random.normal(size=shape).astype(np.float32)
            )
            for name, shape in weight_names.parameter_shapes(numbers).items()
        ],
    )
    if described:
        sidecar.write_sidecar(path, numbers, dtype="F32", fingerprint=identity, source="nowhere")
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_fits_passes_in_silence(tmp_path, tiny, capsys, suffix):
    settings, numbers = tiny
    path = write_weights(tmp_path / f"x{suffix}", numbers)
    sidecar.require_same_model(path, settings)
    assert capsys.readouterr() == ("", "")
    found = sidecar.read_config_of(path)
    assert found.config == numbers
    assert json.loads(found.path.read_text())["fingerprint"] == fingerprints.fingerprint(
        containers.open_tensors(path)
    )


def test_every_difference_is_named_with_both_values(tmp_path, tiny):
    settings, numbers = tiny
    path = write_weights(
        tmp_path / "x.ckpt", replace(numbers, rope_ratio=1, layernorm_epsilon=1e-5, num_layers=3)
    )
    with pytest.raises(UserError) as error:
        sidecar.require_same_model(path, settings)
    for said in (
        "num_layers is 2 in the YAML, 3 in the checkpoint",
        "rope_ratio is 500 in the YAML, 1 in the checkpoint",
        "layernorm_epsilon is 1.5625e-07 in the YAML, 1e-05 in the checkpoint",
        str(path),
    ):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_that_the_yaml_leaves_out_is_a_difference(tmp_path, tiny):
    """MindFormers would silently use its own default: 1 for rope_ratio."""
    settings, numbers = tiny
    del settings["model"]["model_config"]["rope_ratio"]
    with pytest.raises(UserError, match="rope_ratio is not set in the YAML, 500 in the checkpoint"):
        sidecar.require_same_model(write_weights(tmp_path / "x.ckpt", numbers), settings)


def test_without_a_sidecar_shapes_are_checked_and_the_rest_is_warned_of(tmp_path, tiny, capsys):
    settings, numbers = tiny
    path = write_weights(tmp_path / "x.ckpt", replace(numbers, rope_ratio=1), described=False)
    sidecar.require_same_model(path, settings)
    out, err = capsys.readouterr()
    assert out == ""  # predict's output is the answer
    assert len(err.splitlines()) == 1
    assert all(said in err for said in ("warning: ", str(path), "rope_ratio", "layernorm_epsilon"))
    sidecar.require_same_model(path, {**settings, "run_mode": "preprocess"})
    assert "warning: " in capsys.readouterr().out
    others = replace(numbers, num_layers=3, num_attention_heads=4, ffn_hidden_size=64)
    other = write_weights(tmp_path / "y.ckpt", others, described=False)
    with pytest.raises(UserError) as error:
        sidecar.require_same_model(other, settings)
    for said in (
        "num_layers is 2 in the YAML, 3",
        "num_attention_heads * kv_channels is 128 in the YAML, 64",
        "ffn_hidden_size is 256 in the YAML, 64",
    ):
        assert said in str(error.value)
    assert "hidden_size is 128" not in str(error.value)


def test_a_sidecar_of_another_checkpoint_is_refused(tmp_path, tiny):
    settings, numbers = tiny
    path = write_weights(tmp_path / "x.ckpt", numbers)
    write_weights(
        path, numbers, described=False, seed=1
    )  # the file changes, what describes it does not
    with pytest.raises(UserError, match="describes another checkpoint"):
        sidecar.require_same_model(path, settings)


@pytest.mark.parametrize(
    "content", ["{}", '{"numbers": 3}', '{"numbers": {"num_layers": 2}}', "text", "odd"]
)
def test_a_damaged_sidecar_is_refused(tmp_path, tiny, content):
    settings, numbers = tiny
    path = write_weights(tmp_path / "x.ckpt", numbers, described=False)
    if content == "odd":
        content = json.dumps({"numbers": {**asdict(numbers), "rope_ratio": "500"}})
    sidecar.path_beside(path).write_text(content)
    with pytest.raises(
        UserError, match=r"x\.ckpt\.json: .*(no sidecar|not JSON|rope_ratio is '500')"
    ):
        sidecar.require_same_model(path, settings)


def test_numbers_go_through_training_to_the_merged_checkpoint(tmp_path, tiny, capsys):
    """load_checkpoint -> output/model.json -> a state to resume from, and the merged file."""
    settings, numbers = tiny
    path, output = write_weights(tmp_path / "x.ckpt", numbers), tmp_path / "output"
    state = output / "checkpoint" / "rank_0" / "s.ckpt"
    state.parent.mkdir(parents=True)
    write_weights(
        state, replace(numbers, hidden_size=64), described=False
    )  # a card's share has other shapes
    sidecar.require_same_model(state, settings)
    assert "warning" in capsys.readouterr().err
    sidecar.copy_to_run(path, output)
    sidecar.require_same_model(state, settings)
    assert capsys.readouterr().err == ""
    merged = write_weights(tmp_path / "merged.ckpt", numbers, described=False, seed=2)
    assert sidecar.copy_to_result(
        output / "checkpoint_network", merged, dtype="F32", fingerprint="f"
    )
    assert sidecar.read_config_of(merged).config == numbers
    plain = write_weights(tmp_path / "plain.ckpt", numbers, described=False)
    sidecar.copy_to_run(
        plain, output
    )  # nothing is known of these: what an earlier run left must go
    assert not sidecar.copy_to_result(
        f"{output}/checkpoint_network/", merged, dtype="F32", fingerprint="f"
    )
    assert sidecar.read_config_of(merged) is None


@pytest.mark.parametrize("command", ["process", "finetune", "predict"])
def test_each_command_refuses_numbers_that_are_not_the_checkpoints(golden, tmp_path, command):
    """Before anything is computed; both differences in one line."""
    import dpo_preprocess_glm4_parallel as preprocess
    import run_dpo

    more = "    rope_ratio: 1\n    layernorm_epsilon: 1e-5"
    common = [
        "--config",
        str(write_overlay(tmp_path / "x.yaml", command, more)),
        "--load_checkpoint",
        str(golden.checkpoint),
    ]
    run, own = {
        "process": (
            preprocess,
            ["--src", golden.pairs, "--dst", tmp_path / "d", "--tokenizer", golden.tokenizer],
        ),
        "finetune": (
            run_dpo,
            [
                "--train_dataset",
                golden.data,
                "--vocab_file",
                golden.tokenizer,
                "--output_dir",
                tmp_path / "out",
            ],
        ),
        "predict": (run_dpo, ["--vocab_file", golden.tokenizer, "--predict_data", "x"]),
    }[command]
    with pytest.raises(UserError) as error:
        run.main([*common, *map(str, own)])
    assert "layernorm_epsilon is 1e-05 in the YAML, 1.5625e-07 in the checkpoint" in str(
        error.value
    )
    assert "rope_ratio is 1 in the YAML, 500 in the checkpoint" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
