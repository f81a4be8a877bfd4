"""The plan tool, compared with memory and traffic of compiled plans.

The record below was read off MindSpore 2.7 with scripts/rig: each YAML was compiled on 4 or 8 CPU
processes as run_dpo.py compiles it (Glm4DPO, DPOTrainOneStepCell, AdamW, semi_auto_parallel).
Shapes are those of the parameters after compilation, the same on every rank. Traffic is the sum
over the AllGather, ReduceScatter and AllReduce of rank 0's graph before the backend, without
those of a few numbers. Kept bytes are the outputs of forward operators that backward operators
read. The model, unless stated otherwise: 1 layer, vocabulary 1000, hidden 256, ffn 512, 8 heads
of 32, 2 groups, S = 64, 1 row.
"""

import json
import math

import pytest
from conftest import EXAMPLE

from mindrlhf import cli, config
from mindrlhf.models.glm4 import operations
from mindrlhf.plan import __main__ as tool
from mindrlhf.plan import advice, hours, memory, parameters, traffic

NAMES = {
    "transformer.embedding.embedding_weight": 0,
    "transformer.encoder.layers.0.input_layernorm.weight": 1,
    "transformer.encoder.layers.0.self_attention.query_key_value.weight": 2,
    "transformer.encoder.layers.0.self_attention.query_key_value.bias": 3,
    "transformer.encoder.layers.0.self_attention.dense.weight": 4,
    "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": 5,
    "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": 6,
    "transformer.output_layer.weight": 7,
}
# (data, model) parallel, other settings, bytes of weights and moments on a card,
# shapes in the order of NAMES
HELD = {
    "2x2": (
        2,
        2,
        "",
        3218688,
        ((250, 256), (256,), (96, 256), (192,), (64, 256), (256, 256), (128, 256), (250, 256)),
    ),
    "2x2 whole optimizer": (
        2,
        2,
        "whole",
        5657856,
        ((500, 256), (256,), (192, 256), (192,), (128, 256), (512, 256), (256, 256), (250, 256)),
    ),
    "2x2 vocab_emb_dp": (
        2,
        2,
        "vocab",
        3218688,
        ((250, 256), (256,), (96, 256), (192,), (64, 256), (256, 256), (128, 256), (250, 256)),
    ),
    "2x2 vocab_emb_dp, 1002 ids": (
        2,
        2,
        "vocab 1002",
        7838976,
        (  # 1002 is no multiple of 4: neither is split
            (1002, 256),
            (256,),
            (96, 256),
            (192,),
            (64, 256),
            (256, 256),
            (128, 256),
            (1002, 256),
        ),
    ),
    "2x2, 6 heads in 1 group": (
        2,
        2,
        "group",
        3022512,
        ((250, 252), (252,), (64, 252), (128,), (63, 192), (256, 252), (126, 256), (250, 252)),
    ),
    "2x2 adapters": (
        2,
        2,
        "lora",
        1275648,
        ((250, 256), (256,), (96, 256), (192,), (64, 256), (256, 256), (128, 256), (250, 256)),
    ),
    "4x1": (
        4,
        1,
        "",
        3220992,
        ((250, 256), (256,), (96, 256), (384,), (64, 256), (256, 256), (64, 512), (250, 256)),
    ),
    "1x4": (
        1,
        4,
        "",
        3217536,
        ((250, 256), (256,), (96, 256), (96,), (64, 256), (256, 256), (256, 128), (250, 256)),
    ),
    "2x4": (
        2,
        4,
        "",
        1613952,
        ((125, 256), (256,), (48, 256), (96,), (32, 256), (128, 256), (128, 128), (125, 256)),
    ),
    "4x2": (
        4,
        2,
        "",
        1615104,
        ((125, 256), (256,), (48, 256), (192,), (32, 256), (128, 256), (64, 256), (125, 256)),
    ),
    "8x1": (
        8,
        1,
        "",
        1617408,
        ((125, 256), (256,), (48, 256), (384,), (32, 256), (128, 256), (32, 512), (125, 256)),
    ),
}
# (data, model, layers, compute_dtype) -> bytes that rank 0 receives in a step
MOVED = {
    (4, 1, 1, "float32"): 5671770,
    (1, 4, 1, "float32"): 4755974,
    (2, 2, 3, "float32"): 14746430,
    (2, 2, 1, "float16"): 3679550,
    (2, 4, 1, "float32"): 6028991,
    (4, 2, 1, "float32"): 7033307,
    (8, 1, 1, "float32"): 7534569,
    (4, 2, 1, "float16"): 4616667,
}
# the same -> bytes that a layer keeps for its backward pass
KEPT = {
    (1, 4, 1, "float32"): 163844,
    (2, 2, 3, "float32"): 491528 // 3,
    (4, 2, 1, "float32"): 163856,
    (8, 1, 1, "float32"): 327712,
    (2, 2, 1, "float16"): 221192,
    (4, 2, 1, "float16"): 221200,
    (8, 1, 1, "float16"): 442400,
    (2, 4, 1, "float16"): 221192,
}
MORE = {
    "whole": "parallel: {enable_parallel_optimizer: False}",
    "vocab 1002": "",
    "lora": "lora: {rank: 8, alpha: 16, dropout: 0.0, target_modules: [qkv, dense, mlp]}",
}


def settings_of(folder, data, model, what="", *, layers=1, dtype="float32"):
    """Settings of a plan of the record."""
    sizes = {
        "num_layers": layers,
        "padded_vocab_size": 1002 if "1002" in what else 1000,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 8,
        "multi_query_group_num": 2,
        "kv_channels": 32,
        "seq_length": 64,
        "compute_dtype": dtype,
        "use_flash_attention": False,
    }
    if what == "group":
        sizes |= {"hidden_size": 252, "num_attention_heads": 6, "multi_query_group_num": 1}
    path = folder / "plan.yaml"
    path.write_text(
        f"base_config: {EXAMPLE / 'finetune_glm4_9b.yaml'}\ncontext: {{device_target: CPU}}\n"
        f"model: {{model_config: {json.dumps(sizes)}}}\nrunner_config: {{sink_mode: False, "
        f"batch_size: 2}}\ndpo: {{logps_chunk_size: 32}}\n"
        f"parallel_config: {{data_parallel: {data}, model_parallel: {model}, "
        f"vocab_emb_dp: {'vocab' in what}}}\n{MORE.get(what, '')}\n"
    )
    return config.load_settings(path, run_mode="finetune")


@pytest.mark.parametrize("plan", HELD)
def test_weights_gradients_and_moments_are_those_of_the_ranks(tmp_path, plan):
    data, model, what, total, shapes = HELD[plan]
    settings = settings_of(tmp_path, data, model, what)
    found = parameters.parameter_bytes(settings, data * model)
    assert [found[name] for name in NAMES] == [4 * math.prod(shapes[at]) for at in NAMES.values()]
    assert sum(found.values()) == total
    parts = memory.memory_parts(settings, data * model)
    assert parts["weights"] + parts["Adam's moments"] == total
    assert parts["gradients"] * 2 == parts["Adam's moments"]


def test_adapters_are_split_like_the_matrices_beside_them(tmp_path):
    """The 2x2 ranks hold all of A and half of B; of the last matrix, half of A and all of B. All
    are too small for optimizer sharding.
    """
    table = parameters.held(settings_of(tmp_path, 2, 2, "lora"), 4)
    shapes = {
        name.split("layers.0.")[1].replace(".mindpet_delta_lora_", " "): part.slice
        for name, part in table.items()
        if "lora" in name
    }
    assert shapes == {
        "self_attention.query_key_value a": (8, 256),
        "self_attention.query_key_value b": (192, 8),
        "self_attention.dense a": (8, 256),
        "self_attention.dense b": (128, 8),
        "mlp.dense_h_to_4h a": (8, 256),
        "mlp.dense_h_to_4h b": (512, 8),
        "mlp.dense_4h_to_h a": (8, 256),
        "mlp.dense_4h_to_h b": (256, 8),
    }


def test_the_9b_weights_by_hand():
    """Parameters: 2 x 151552 x 4096 + 40 x (2 x 4096 + 4608 x 4097 + 4096^2 + 27392 x 4096 + 4096 x
    13696) + 4096 = 9,399,951,360.

    On one card of 4 x 2, every matrix is one of 8 parts; norms (4096) are not split, biases (4608)
    are halved: 81 x 4096 + 40 x 2304 = 423,936 numbers instead of 1/8 of 81 x 4096 + 40 x 4608 =
    516,096.
    """
    settings = config.load_settings(EXAMPLE / "finetune_glm4_9b.yaml", run_mode="finetune")
    assert (
        sum(math.prod(shape) for shape in parameters.all_shapes(settings).values()) == 9_399_951_360
    )
    assert memory.memory_parts(settings, 8)["weights"] == 4 * (
        (9_399_951_360 - 516_096) // 8 + 423_936
    )


@pytest.mark.parametrize("plan", MOVED)
def test_traffic_is_that_of_the_compiled_graphs(tmp_path, plan):
    """Within 1e-4 (the rest is loss and norm), except for 1x4, where one all-reduce is a
    reduce-scatter, and for 16 bits, where the scores of plain attention are float32 in one
    direction.
    """
    data, model, layers, dtype = plan
    found = traffic.traffic_volumes(
        settings_of(tmp_path, data, model, layers=layers, dtype=dtype), data * model
    )
    close = 0.05 if (data, model) == (1, 4) or dtype == "float16" else 1e-4
    assert sum(found.values()) == pytest.approx(MOVED[plan], rel=close)


def test_traffic_and_kept_bytes_with_flash_attention(tmp_path):
    """2x2, compiled but not run: keys and values are sent before they are repeated, and neither
    scores nor masks are sent.
    """
    settings = settings_of(tmp_path, 2, 2)
    settings["model"]["model_config"]["use_flash_attention"] = True
    assert sum(traffic.traffic_volumes(settings, 4).values()) == pytest.approx(4613446, rel=1e-4)
    assert memory.layer_kept(settings, memory.shares_of(settings, 4)) == pytest.approx(
        163848, rel=1e-3
    )


@pytest.mark.parametrize("plan", KEPT)
def test_a_layer_keeps_what_the_compiled_graphs_keep(tmp_path, plan):
    data, model, layers, dtype = plan
    settings = settings_of(tmp_path, data, model, layers=layers, dtype=dtype)
    shares = memory.shares_of(settings, data * model)
    assert memory.layer_kept(settings, shares) == pytest.approx(KEPT[plan], rel=1e-3)


def test_a_sharded_step_adds_up_the_gradients_of_chunks_one_by_one(tmp_path):
    """2x2: 4 rows of 64 are 8 chunks of 32. The graph has 7 sums of two (256, 256) and 7 of two
    (250, 256), and the next chunk's logits wait for each: two terms and their sum exist at once.
    """
    settings = settings_of(tmp_path, 2, 2)
    assert (
        memory.chunk_gradients(settings, memory.shares_of(settings, 4)) == 3 * (256 + 250) * 256 * 4
    )


def test_chunks_are_as_many_as_in_the_graph(tmp_path):
    settings = settings_of(tmp_path, 4, 2)
    settings["dpo"]["logps_chunk_size"] = 1  # 512 positions in at most 64 chunks
    assert memory.chunks(settings, memory.shares_of(settings, 8)) == (8, 64)


def test_published_throughput():
    """GLM-4-9B, SFT at 8192 on 8 cards: 2339 tokens/s/card; MindFormers' YAML recomputes 6 + 3 + 2
    + 3 = 14 of 40 layers.

    By hand, a position's forward pass: 40 layers of 2 x (4096 x 4608 + 4096^2 + 3 x 4096 x 13696) +
    4 x 8192 x 4096, that is 40 x 542,113,792 = 21.68e9, and the output layer's 2 x 4096 x 151552 =
    1.24e9. A step: 21.68e9 x 3.35 + 1.24e9 x 3 = 76.4e9. At 45 % of 376e12: 2216 a second. The
    smaller variant's 313e12: 1845.
    """
    settings = config.load_settings(
        EXAMPLE / "finetune_glm4_9b.yaml",
        run_mode="finetune",
        overrides={"dpo.logps_chunk_size": 0},
    )
    layers, output = operations.forward_operations(settings)
    assert layers == 40 * (2 * (4096 * 4608 + 4096**2 + 3 * 4096 * 13696) + 4 * 8192 * 4096)
    assert output == 2 * 4096 * 151552
    step = operations.step_operations(settings, recomputed=14 / 40)
    assert step == pytest.approx(76.35e9, rel=1e-3)
    for peak in (376e12, 313e12):
        assert hours.tokens_per_second(step, peak=peak) == pytest.approx(2339, rel=0.25)


def test_hours_by_hand(tmp_path):
    """8 independent cards, 4000 rows: preprocessing scores 500 rows a card of 8192 positions, one
    forward pass of 22.93e9 operations each, at 45 % of 313e12 a second: 500 x 8192 x 22.93e9 /
    140.85e12 = 667 s.
    """
    settings = config.load_settings(EXAMPLE / "process_glm4_9b.yaml", run_mode="preprocess")
    least, most = hours.run_hours(settings, 8, 4000)
    assert least == most == pytest.approx(667 / 3600, rel=0.005)


def test_max_steps_and_accumulation_in_the_hours(capsys, tmp_path):
    """33 rows: with one row for each of 4 groups of cards and 8 parts, 32 rows a step, so 2 steps
    of 8 parts. max_steps 1 leaves one.
    """
    path, printed, spans = tmp_path / "x.yaml", {}, {}
    for steps in (0, 1):
        path.write_text(
            f"base_config: {EXAMPLE / 'finetune_glm4_9b.yaml'}\nrunner_config: {{epochs: 1, "
            "batch_size: 1, gradient_accumulation_steps: 8" + (", max_steps: 1}" if steps else "}")
        )
        settings = config.load_settings(path, run_mode="finetune")
        part = hours.seconds_per_part(settings, 8)
        spans[steps] = hours.run_hours(settings, 8, 33)
        tool.main([str(path), "--rows", "33"])
        printed[steps] = capsys.readouterr().out
    assert spans[1].most == pytest.approx(8 * sum(part) / 3600)
    assert spans[0].most == pytest.approx(2 * spans[1].most)
    assert "33 rows: 2 steps an epoch" in printed[0]
    assert f"a step: {8 * part.computing:.1f} s computing" in printed[0]


def test_the_yamls_fit_and_say_what_the_tool_prints(capsys):
    for name, words in (
        ("finetune_glm4_9b", "at most 52.0 GB"),
        ("finetune_glm4_9b_lora", "at most 48.5 GB"),
        ("process_glm4_9b", "at most 23.1 GB"),
    ):
        path = EXAMPLE / f"{name}.yaml"
        tool.main([str(path), "--rows", "3000"])
        printed = capsys.readouterr().out
        assert words in printed
        assert "of 58 GB: fits" in printed
        assert len(printed.splitlines()) < 25  # one screen
        assert words.removeprefix("at most ") in path.read_text()


def advice_of(tmp_path, text, memory_gb=64):
    """What the tool advises for changes of finetune_glm4_9b.yaml."""
    path = tmp_path / "plan.yaml"
    path.write_text(f"base_config: {EXAMPLE / 'finetune_glm4_9b.yaml'}\n{text}\n")
    settings = config.load_settings(path, run_mode="finetune")
    return advice.advice(settings, 8, advice.room(settings, memory_gb))


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("dpo: {logps_chunk_size: 0}", "dpo.logps_chunk_size 512"),
        ("recompute_config: {recompute: False}", "recompute_config.recompute 29"),
        (
            "runner_config: {batch_size: 4}\nrecompute_config: {recompute: True}",
            "runner_config.batch_size 2",
        ),
        (
            "parallel_config: {data_parallel: 8, model_parallel: 1}\n"
            "recompute_config: {recompute: True}\ncontext: {max_device_memory: 50GB}",
            "data_parallel 4, model_parallel 2",
        ),
    ],
)
def test_the_first_thing_to_change(tmp_path, text, change):
    assert "change first: " in advice_of(tmp_path, text)
    assert change in advice_of(tmp_path, text)


def test_a_card_too_small_for_any_change_gets_another_advice(tmp_path):
    assert "LoRA" in advice_of(tmp_path, "", memory_gb=8)


def test_rows_come_from_the_sidecar(tmp_path, golden, capsys):
    tool.main([str(golden.finetune), "--devices", "1", "--data", str(golden.data)])
    rows = json.loads((golden.folder / "golden.mindrecord.json").read_text())["rows"]
    assert f"{rows} rows: " in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="seq_length 8192; give the YAML"):
        tool.main([str(EXAMPLE / "process_glm4_9b.yaml"), "--data", str(golden.data)])


def test_flash_attention_needs_a_key_value_head_on_each_card():
    """Compiled with scripts/rig, 1x4 ends with "operator FlashAttentionScore init failed": 2 groups
    cannot be split over 4 cards.
    """
    with pytest.raises(
        cli.UserError, match="multi_query_group_num must be a multiple of model_parallel"
    ):
        config.load_settings(
            EXAMPLE / "finetune_glm4_9b.yaml",
            run_mode="finetune",
            overrides={"parallel_config.data_parallel": 2, "parallel_config.model_parallel": 4},
        )


def test_a_plan_for_another_number_of_cards_is_refused():
    with pytest.raises(cli.UserError, match="data_parallel \\* model_parallel = 8, but 4"):
        tool.main([str(EXAMPLE / "finetune_glm4_9b.yaml"), "--devices", "4"])
