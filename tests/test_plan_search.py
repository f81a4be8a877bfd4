"""Recomputing some layers, and the search for the fastest plan that fits."""

import json

import numpy as np
import pytest
import yaml
from conftest import EXAMPLE, write_overlay
from test_plan import MOVED, settings_of

from mindrlhf import cli, config, recompute, rehearsal
from mindrlhf.data import groups, row_length
from mindrlhf.models.glm4 import build, operations
from mindrlhf.parallel import Plan
from mindrlhf.plan import __main__ as tool
from mindrlhf.plan import advice, hours, memory, search, traffic, workload

YAML = EXAMPLE / "finetune_glm4_9b.yaml"
LIMIT = 58e9
# value in the YAML -> of 3 layers, which are recomputed
VALUES = [(True, 3), (False, 0), (0, 0), (1, 1), (2, 2), (9, 3), ([0], 0), ([2], 2), ([True], 3)]


def load(**overrides):
    """Settings of the 9B YAML; keys are dotted, with __ for dots."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load_settings(YAML, run_mode="finetune", overrides=changes)


WORK = workload.Workload(3000, 8192, 120_000)


@pytest.fixture(scope="module")
def found():
    """The plans for the 9B YAML and WORK."""
    return search.find_plans(load(), 8, LIMIT, WORK)


def with_layers(count):
    return load(recompute_config__recompute=count)


@pytest.mark.parametrize(("value", "count"), VALUES)
def test_the_first_layers_are_recomputed(tmp_path, value, count):
    """MindFormers' LayerSetting sets a flag on each layer that is recomputed."""
    from mindrlhf import runtime

    settings = config.load_settings(
        write_overlay(tmp_path / "three.yaml", "finetune"),
        run_mode="finetune",
        overrides={
            "recompute_config.recompute": value,
            "model.model_config.use_flash_attention": True,  # MindFormers' cells, as on an NPU
        },
    )
    assert recompute.recomputed_layers(settings) == count
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    layers = build.build_network(run).transformer.encoder.layers
    flags = [layer._has_config_recompute for layer in layers]
    assert flags == [True] * count + [False] * (3 - count)
    assert settings["recompute_config"]["recompute"] == value  # MindFormers changed its own copy


@pytest.mark.parametrize("value", [-1, 1.5, "all", [], [1, 2], [-1], ["x"], [[1]]])
def test_other_values_are_refused(value):
    with pytest.raises(cli.UserError, match="recompute_config.recompute: expected True, False, a"):
        with_layers(value)


def test_all_layers_as_a_number_cost_what_true_costs():
    assert memory.memory_parts(with_layers(40), 8) == memory.memory_parts(with_layers(True), 8)
    assert memory.peak_memory_of(with_layers([40]), 8) == memory.peak_memory_of(
        with_layers(True), 8
    )
    assert traffic.traffic_volumes(with_layers(40), 8) == traffic.traffic_volumes(
        with_layers(True), 8
    )
    assert operations.step_operations(with_layers(0)) == operations.step_operations(
        with_layers(False)
    )


def test_only_recomputed_layers_cost_time_and_save_memory():
    """By hand: a layer's forward pass takes 542,113,792 operations a position
    (test_plan.test_published_throughput).
    """
    some, more = with_layers(10), with_layers(11)
    assert operations.step_operations(more) - operations.step_operations(some) == pytest.approx(
        542_113_792
    )
    shares = memory.shares_of(some, 8)
    saved = memory.layer_whole(some, shares.group) - memory.layer_kept(some, shares)
    name = "kept by the layers"
    assert memory.memory_parts(some, 8)[name] - memory.memory_parts(more, 8)[name] == saved
    moved = "tensor-parallel gathers"
    each = traffic.layer(some, 8)
    assert traffic.traffic_volumes(more, 8)[moved] - traffic.traffic_volumes(some, 8)[
        moved
    ] == pytest.approx(each.forward - each.once)


def test_memory_falls_with_every_recomputed_layer():
    totals = [memory.peak_memory_of(with_layers(count), 8).bytes for count in range(41)]
    assert totals == sorted(totals, reverse=True)


def test_the_compiled_traffic_is_that_of_the_layers_recomputed(tmp_path):
    """2x2 with 3 layers was compiled with all of them recomputed."""
    settings = settings_of(tmp_path, 2, 2, layers=3)
    settings["recompute_config"]["recompute"] = 3
    assert sum(traffic.traffic_volumes(settings, 4).values()) == pytest.approx(
        MOVED[2, 2, 3, "float32"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "count", "least", "rate"),
    [("finetune_glm4_9b", 34, 29, 1592), ("finetune_glm4_9b_lora", 28, 20, 2262)],
)
def test_the_yamls_recompute_what_surely_fits_and_say_how_fast_that_is(name, count, least, rate):
    """If all activations were a fifth larger than estimated, they would fit, too."""
    path = EXAMPLE / f"{name}.yaml"
    settings = config.load_settings(path, run_mode="finetune")
    assert recompute.recomputed_layers(settings) == count
    assert advice.fewest_recomputed(settings, 8, LIMIT) == least
    parts = memory.memory_parts(settings, 8)
    exact = ("weights", "Adam's moments", "gradients", "weights in compute type", "buffers")
    peak = memory.peak_memory_of(settings, 8).bytes
    assert peak + 0.2 * (peak - sum(parts[name] for name in exact)) < LIMIT
    found = hours.tokens_per_second(operations.step_operations(settings), peak=313e12)
    assert round(found) == rate
    assert f"{rate} tokens/s/card" in path.read_text()


def test_what_the_yaml_says_about_2400_tokens():
    text = YAML.read_text()
    for changes, rate in (
        ({"recompute_config__recompute": True}, 1536),
        ({"recompute_config__recompute": 0}, 2012),
        ({"recompute_config__recompute": 0, "model__model_config__seq_length": 2048}, 2431),
    ):
        step = operations.step_operations(load(**changes))
        assert round(hours.tokens_per_second(step, peak=313e12)) == rate
        assert str(rate) in text
    for changes, size in (
        ({"recompute_config__recompute": True}, "45.1 GB"),
        ({"recompute_config__recompute": 0}, "91.2 GB"),
        ({"recompute_config__recompute": 0, "model__model_config__seq_length": 2048}, "43.1 GB"),
        (
            {
                "recompute_config__recompute": True,
                "parallel_config__data_parallel": 8,
                "parallel_config__model_parallel": 1,
            },
            "54.3 GB",
        ),
        ({"recompute_config__recompute": True, "model__model_config__seq_length": 4096}, "36.0 GB"),
    ):
        assert f"{memory.peak_memory_of(load(**changes), 8).bytes / 1e9:.1f} GB" == size
        assert size in text


def test_disk_and_pairs_in_the_report(capsys):
    """By hand: 9.4e9 x 12 bytes are 112.8 GB (norms and biases are held by several cards); 2 states
    are kept while a third is written, and the weights take a third of a state. 8192 // 290 = 28
    pairs a row: 1000 pairs are 36 rows.
    """
    tool.main([str(YAML), "--pairs", "1000", "--tflops", "313"])
    printed = capsys.readouterr().out
    assert "disk: 376.1 GB over all cards: 3 states of 112.8 GB" in printed
    assert "final weights of 37.6 GB" in printed
    assert "with --eval_dataset 75.2 GB more" in printed
    assert "36 rows: " in printed
    assert "1592 tokens/s/card" in printed
    tool.main([str(YAML), "--pairs", "1000", "--pair_tokens", "4096"])
    assert "500 rows: " in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--search"]])
def test_the_exit_status_is_1_if_nothing_fits(capsys, more):
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(YAML), "--memory", "8", *more])
    assert stopped.value.code == 1
    assert "LoRA" in capsys.readouterr().out


def test_adapters_are_named_where_full_training_does_not_fit():
    """At 40 GB, full training does not even fit with all changes at this row length."""
    settings = load(model__model_config__seq_length=8192)
    sentence = advice.adapter_advice(settings, 8, 40e9)
    assert "LoRA" in sentence
    assert "35.5 GB" in sentence
    adapters = config.load_settings(EXAMPLE / "finetune_glm4_9b_lora.yaml", run_mode="finetune")
    assert advice.adapter_advice(adapters, 8, 1e9) == "use more cards"
    whole = config.load_settings(EXAMPLE / "process_glm4_9b.yaml", run_mode="preprocess")
    assert "model_parallel 2" in advice.adapter_advice(whole, 64, 16e9)  # each card holds it all
    assert adapters["lora"] == advice.ADAPTERS


def test_the_search_keeps_legal_plans_that_fit_and_sorts_them(found):
    settings = load()
    assert len(found) > 10
    shapes = set()
    for each in found:
        changed = config.with_changes(settings, each.changes)
        assert not rehearsal.plan_problems(changed, 8)
        assert not config.find_contradictions(changed)
        assert memory.peak_memory_of(changed, 8).bytes == each.bytes <= LIMIT
        data, model, length, batch, parts, layers, _ = each.changes.values()
        assert data * model == 8
        assert data * length * batch * parts == 4 * 8192  # tokens of an update
        if layers:  # one less does not fit
            fewer = config.with_changes(changed, {"recompute_config.recompute": layers - 1})
            assert memory.peak_memory_of(fewer, 8).bytes > LIMIT
        # 40 pairs in 8192 positions; 8 cards
        assert each.pairs == pytest.approx(each.tokens * 8 / 8192 * 40)
        shapes.add((data, length, batch))
    assert len(shapes) == len(found)
    assert [each.tokens for each in found] == sorted((e.tokens for e in found), reverse=True)
    assert found[0].tokens > search.measure_plan(settings, 8).tokens
    lines = search.search_lines(found, search.measure_plan(settings, 8, WORK))
    assert len(lines) == 2 + search.SHOWN + 1
    assert max(map(len, lines)) <= 100


def test_known_pairs_are_trained_as_fast_as_possible_not_their_padding():
    """400 pairs of 270 positions: a row of 512 holds one, and one of 4096 holds 15."""
    prompts = np.full(400, 71, np.int32)
    answers = np.stack([np.repeat(np.arange(400), 2), np.full(800, 100)], 1).astype(np.int32)
    sizes = groups.Sizes(prompts, answers, np.arange(800, dtype=np.int32).reshape(-1, 2))
    found = search.find_plans(load(), 8, LIMIT, workload.Workload(27, 4096, 400, sizes))
    assert [each.pairs for each in found] == sorted((e.pairs for e in found), reverse=True)
    assert found[0].changes["model.model_config.seq_length"] > 512
    best = row_length.fastest_length(sizes, lambda length: 1 + length / 65536)
    assert best.seq_len == 4096  # 512 takes 400 rows, 1024 134, 2048 58, 4096 27


def test_rows_stay_long_enough_for_the_pairs():
    """Pairs of 2048 tokens: rows below 4 of them are not tried, except for the YAML's own."""
    found = search.find_plans(load(), 8, LIMIT, workload.Workload(3000, 8192, 12_000))
    assert {each.changes["model.model_config.seq_length"] for each in found} == {8192}


def test_the_speed_counts_computing_and_communication():
    settings = load()
    step = hours.seconds_per_part(settings, 8)
    assert search.measure_plan(settings, 8).tokens == pytest.approx(8192 / 2 / sum(step))


def test_the_overlay_of_a_search_is_rehearsed(tmp_path, capsys, found):
    """It has the keys that differ, loads, and the rehearsal makes its YAMLs of it."""
    target = tmp_path / "inner" / "fast.yaml"
    tool.main(
        [str(YAML), "--search", "--pairs", "120000", "--pair_tokens", "204", "--write", str(target)]
    )
    first = capsys.readouterr().out.splitlines()[2].split()
    own = yaml.safe_load(target.read_text())
    base = own.pop("base_config")
    assert (target.parent / base).samefile(YAML)
    best = found[0]  # 120000 pairs are 3000 rows of 40
    settings = config.load_settings(target, run_mode="finetune")
    for key, value in best.changes.items():
        assert config.get_setting(settings, key, 1) == value
        differs = config.get_setting(load(), key, 1) != value
        assert (config.get_setting(own, key) is not None) == differs
    assert f"--seq_len {first[4]}.\n" in target.read_text()
    plan = rehearsal.open_rehearsal(str(target), 8, "CPU")
    assert not rehearsal.plan_problems(plan.settings, 8)
    rehearsal.write_settings(
        plan, str(EXAMPLE / "process_glm4_9b.yaml"), str(EXAMPLE / "predict_glm4_9b.yaml"), tmp_path
    )
    for name, mode in (("many", "finetune"), ("one", "finetune"), ("process", "preprocess")):
        config.load_settings(tmp_path / f"{name}.yaml", run_mode=mode)
    many = config.load_settings(tmp_path / "many.yaml", run_mode="finetune")
    assert Plan.of(many).cards == 8
    assert recompute.recomputed_layers(many) == 1  # of two: 0 < 37 < 40


def test_a_rehearsal_of_all_layers_recomputes_all(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(f"base_config: {YAML}\nrecompute_config: {{recompute: True}}\n")
    plan = rehearsal.open_rehearsal(str(path), 8, "CPU")
    rehearsal.write_settings(
        plan, str(EXAMPLE / "process_glm4_9b.yaml"), str(EXAMPLE / "predict_glm4_9b.yaml"), tmp_path
    )
    assert recompute.recomputed_layers(config.read_yaml(tmp_path / "many.yaml")) == 2


def test_the_search_reads_pairs_from_the_data(tmp_path, golden):
    settings = config.load_settings(golden.finetune, run_mode="finetune")
    sidecar = json.loads((golden.folder / "golden.mindrecord.json").read_text())
    work = workload.workload_of(settings, data=str(golden.data))
    assert (work.rows, work.pairs) == (sidecar["rows"], sidecar["pairs"]["written"])


def test_pairs_are_packed_at_every_length_if_their_texts_are_given(golden, capsys):
    """The golden pairs are 3 rows of 384 positions; the longest takes 207, so 192 is too short."""
    settings = config.load_settings(golden.finetune, run_mode="finetune")
    options = {"src": [str(golden.pairs)], "tokenizer": str(golden.tokenizer)}
    work = workload.workload_of(settings, **options)
    assert (work.rows, work.pairs) == (3, 8)
    assert [work.rows_at(length) for length in (384, 1040, 207)] == [3, 1, 8 - 2]
    assert [work.fits(length) for length in (206, 207)] == [False, True]
    assert work.pairs_per_row(1040) == 8
    tool.main(
        [str(golden.finetune), "--devices", "1", "--src", options["src"][0], "--tokenizer"]
        + [options["tokenizer"]]
    )
    assert "3 rows: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--src", "x.jsonl"], "--src and --tokenizer: .*both"),
        (["--pairs", "9", "--tokenizer", "x"], "--src and --tokenizer: .*both"),
        (["--write", "x.yaml"], "--write: .*add --search"),
        (["--pair_tokens", "9"], "--pair_tokens: .*add --pairs"),
        (["--search", "--write", str(YAML)], "--write .*is the YAML that is searched"),
        (["--pairs", "9", "--rows", "9"], "not allowed with"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(cli.UserError, match=words):
        tool.main([str(YAML), *options])


def test_the_search_needs_a_sharded_training():
    with pytest.raises(cli.UserError, match="--search: needs a YAML of run_mode finetune"):
        tool.main([str(EXAMPLE / "process_glm4_9b.yaml"), "--search"])


def test_a_matrix_that_the_plan_cannot_split_is_a_contradiction():
    with pytest.raises(cli.UserError, match="ffn_hidden_size must be a multiple of model_parallel"):
        load(model__model_config__ffn_hidden_size=13697)
