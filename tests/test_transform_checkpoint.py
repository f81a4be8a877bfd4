"""Shards to one file, one file to shards, shards to other shards: hand-made shards, and strategies
of real runs.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

import transform_checkpoint
from mindrlhf.checkpoints import containers, fingerprints, layouts, reshard, tensors
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import model_config, sidecar, weight_names

STRATEGIES = Path(__file__).parent / "golden" / "strategies"
NUMBERS = model_config.ModelConfig(
    num_layers=2,
    padded_vocab_size=256,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    multi_query_group_num=2,
    kv_channels=16,
    layernorm_epsilon=1e-5,
    rope_ratio=1,
    eos_token_id=(1,),
    pad_token_id=0,
)


def whole(seed=0, dtype="F32"):
    """Stored values of every weight, no two of a tensor the same in float32."""
    random = np.random.default_rng(seed)

    def values(shape):
        return random.permutation(np.prod(shape)).astype(np.float32).reshape(shape) + 0.5

    return {
        name: tensors.round_to(values(shape), dtype)
        for name, shape in weight_names.parameter_shapes(NUMBERS).items()
    }


def part(array, axis, count, number):
    """Part `number` of `count` equal parts along an axis."""
    return np.split(array, count, axis)[number]


def by_hand(plan, name, array, rank):
    """What a card holds: card = data-parallel place x model_parallel + model-parallel place.

    Model parallelism splits the rows, but the columns of the MLP's second matrix. The output layer
    is split over all cards. Optimizer sharding splits the rows of each part over the cards that
    would hold copies of it, except for the small bias of the attention.
    """
    data, model = map(int, plan.split("x"))
    data_place, model_place = divmod(rank, model)
    if "output_layer" in name:
        return part(array, 0, data * model, rank)
    if "norm" in name:
        return array if plan == "1x2" else part(array, 0, data * model, rank)
    array = part(array, 1 if "4h_to_h" in name else 0, model, model_place)
    return array if "bias" in name else part(array, 0, data, data_place)


def cards(plan):
    data, model = plan.split("x")
    return int(data) * int(model)


def write(path, arrays, dtype="F32"):
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [tensors.TensorItem.of_array(name, dtype, array) for name, array in arrays.items()]
    containers.write_tensors(path, items)


def write_shards(folder, plan, arrays, *, dtype="F32", file="x.ckpt", more=None):
    """Shards of a run, and its strategy files in the folder's `strategy`."""
    for rank in range(cards(plan)):
        held = {name: by_hand(plan, name, array, rank) for name, array in arrays.items()}
        write(folder / f"rank_{rank}" / file, {**held, **(more or {})}, dtype)
        copy_strategy(folder / "strategy", plan, rank)
    return folder


def copy_strategy(folder, plan, rank=0):
    folder.mkdir(exist_ok=True)
    shutil.copy(STRATEGIES / f"{plan}.ckpt", folder / f"ckpt_strategy_rank_{rank}.ckpt")
    return folder


def run(source, target, **options):
    more = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    transform_checkpoint.main(
        ["--src_checkpoint", str(source), "--dst_checkpoint", str(target), *more]
    )


def assert_holds(path, arrays, dtype="F32"):
    found = containers.open_tensors(path)
    assert list(found) == list(arrays)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (dtype, arrays[name].shape), name
        assert tensor.array().tobytes() == np.ascontiguousarray(arrays[name]).tobytes(), name


def assert_shards(folder, plan, arrays, dtype="F32", suffix=".ckpt"):
    for rank in range(cards(plan)):
        assert_holds(
            folder / f"rank_{rank}" / f"sharded{suffix}",
            {name: by_hand(plan, name, array, rank) for name, array in arrays.items()},
            dtype,
        )
    assert len([path for path in folder.iterdir() if path.name.startswith("rank_")]) == cards(plan)


# layouts


def test_layout_of_a_card_by_hand():
    """12 cards as a matrix of 3 rows and 4 columns; card 7 is in row 1, column 3. The rows split
    the tensor's second dimension: 3 parts, of which card 7 has part 1. The plan does not split its
    first dimension, so the 4 columns hold copies, and optimizer sharding by 2 gives them parts 0,
    1, 0, 1.
    """
    layout = layouts.TensorLayout((3, 4), ((), (0,)), 2)
    assert (layout.cards, layout.splits, layout.index(7)) == (12, (2, 3), (1, 1))
    assert layout.whole((5, 7)) == (10, 21)
    assert layout.block((1, 1), (10, 21)) == (slice(5, 10), slice(7, 14))
    assert layouts.TensorLayout((2, 2), ((0, 1),)).index(2) == (
        2,
    )  # one dimension split by both axes
    assert layouts.TensorLayout((2, 2), ((1, 0),)).index(2) == (1,)


@pytest.mark.parametrize(
    ("plan", "name", "splits"),
    [
        ("2x2", "transformer.embedding.embedding_weight", (4, 1)),
        ("2x2", "transformer.output_layer.weight", (4, 1)),
        ("2x2", "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight", (2, 2)),
        ("1x4", "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight", (1, 4)),
        ("1x2", "transformer.encoder.final_layernorm.weight", (1,)),
    ],
)
def test_layouts_of_real_runs(plan, name, splits):
    found = layouts.read_strategy(STRATEGIES / f"{plan}.ckpt")
    assert len(found) == 17 * 3  # weights and two moments
    assert (found[name].cards, found[name].splits) == (cards(plan), splits)


# round trips


@pytest.mark.parametrize(
    ("plan", "suffix", "dtype"),
    [
        ("2x2", ".ckpt", "F32"),
        ("1x4", ".safetensors", "BF16"),
        ("4x1", ".safetensors", "F32"),
        ("1x2", ".ckpt", "F16"),
    ],
)
def test_shards_become_one(tmp_path, monkeypatch, plan, suffix, dtype):
    monkeypatch.setattr(reshard, "GROUP", 100_000)  # several groups of tensors
    arrays = whole(dtype=dtype)
    source = write_shards(tmp_path / "source", plan, arrays, dtype=dtype, file=f"x{suffix}")
    run(source, tmp_path / f"one{suffix}", src_strategy=source / "strategy")
    assert_holds(tmp_path / f"one{suffix}", arrays, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one{suffix}", "source"]


@pytest.mark.parametrize(
    ("first", "second", "suffix", "dtype"),
    [
        ("2x2", "1x4", ".ckpt", "F32"),
        ("4x1", "2x2", ".safetensors", "BF16"),
        ("2x2", "1x2", ".ckpt", "F32"),
        ("1x2", "2x2", ".ckpt", "F32"),
    ],
)
def test_one_to_shards_to_other_shards_to_one(tmp_path, capsys, first, second, suffix, dtype):
    """Each station by hand; 2x2 -> 1x2 changes the number of cards."""
    arrays, options = whole(1, dtype), {"format": suffix[1:]}
    write(tmp_path / "one.ckpt", arrays, dtype)
    run(tmp_path / "one.ckpt", tmp_path / "a", dst_strategy=STRATEGIES / f"{first}.ckpt", **options)
    assert_shards(tmp_path / "a", first, arrays, dtype, suffix)
    run(
        tmp_path / "a",
        tmp_path / "b",
        src_strategy=tmp_path / "a/strategy",
        dst_strategy=STRATEGIES / f"{second}.ckpt",
        **options,
    )
    assert_shards(tmp_path / "b", second, arrays, dtype, suffix)
    run(tmp_path / "b", tmp_path / "back", src_strategy=tmp_path / "b/strategy", **options)
    assert_holds(tmp_path / f"back/merged{suffix}", arrays, dtype)
    identity = fingerprints.fingerprint(containers.open_tensors(tmp_path / "one.ckpt"))[:12]
    assert capsys.readouterr().out.count(f"fingerprint {identity}") == 3


def test_the_numbers_of_the_model_travel_with_shards_and_back(tmp_path):
    write(tmp_path / "one.ckpt", whole())
    identity = fingerprints.fingerprint(containers.open_tensors(tmp_path / "one.ckpt"))
    sidecar.write_sidecar(
        tmp_path / "one.ckpt", NUMBERS, dtype="F32", fingerprint=identity, source="nowhere"
    )
    run(tmp_path / "one.ckpt", tmp_path / "shards", dst_strategy=STRATEGIES / "2x2.ckpt")
    run(tmp_path / "shards", tmp_path / "back.ckpt", src_strategy=tmp_path / "shards/strategy")
    for place in ("shards", "shards/rank_3/sharded.ckpt", "back.ckpt"):
        assert sidecar.read_config_of(tmp_path / place).config == NUMBERS
    assert sidecar.read_sidecar(tmp_path / "back.ckpt.json").about["fingerprint"] == identity


# training states, steps


def write_states(folder, plan="2x2"):
    """States of steps 2 and 4 as training leaves them, with the optimizer's part."""
    for step in (2, 4):
        more = {
            "adam_m.transformer.output_layer.weight": np.ones((64, 64), np.float32),
            "step_num": np.array([step], np.float32),
            "learning_rate": np.array(0.1, np.float32),
        }
        write_shards(folder, plan, whole(step), file=f"glm4_dpo-step_{step:08d}.ckpt", more=more)
    return folder


def test_last_step_and_the_one_asked_for(tmp_path, capsys):
    source = write_states(tmp_path / "checkpoint")
    run(source, tmp_path / "last.ckpt", src_strategy=source / "strategy")
    run(source, tmp_path / "two.ckpt", src_strategy=source / "strategy", step=2)
    assert_holds(tmp_path / "last.ckpt", whole(4))
    assert_holds(tmp_path / "two.ckpt", whole(2))
    with pytest.raises(UserError, match="no checkpoint of step 3; steps found: 2, 4"):
        run(source, tmp_path / "three.ckpt", src_strategy=source / "strategy", step=3)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_step_that_is_not_whole_on_all_ranks_is_passed_over(tmp_path, capsys, damage):
    import mindspore as ms

    source = write_states(tmp_path / "checkpoint")
    path = source / "rank_2/glm4_dpo-step_00000004.ckpt"
    if damage == "flipped":  # MindSpore's checksum tells
        ms.save_checkpoint(
            [
                {"name": tensor.name, "data": ms.Tensor(tensor.array())}
                for tensor in containers.open_tensors(path).values()
            ],
            str(path),
            crc_check=True,
        )
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    else:
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:-30])
    run(source, tmp_path / "out.ckpt", src_strategy=source / "strategy")
    said = capsys.readouterr().out
    assert "step 2" in said
    assert "rank_2" in said
    assert_holds(tmp_path / "out.ckpt", whole(2))


# bad input: one line, nothing left


def lose_rank(source):
    shutil.rmtree(source / "rank_1")


def lose_last_rank(source):
    shutil.rmtree(source / "rank_3")


def empty_rank(source):
    (source / "rank_1/x.ckpt").unlink()


def other_step(source):
    write(
        source / "rank_1/x.ckpt",
        {name: by_hand("2x2", name, array, 1) for name, array in whole(9).items()},
    )


def steps_apart(source):
    for rank in range(4):
        (source / f"rank_{rank}/x.ckpt").rename(
            source / f"rank_{rank}/x-step_{rank % 2 + 1:08d}.ckpt"
        )


def other_step_beside(source):
    for rank in range(4):
        (source / f"rank_{rank}/step.json").write_text(f'{{"step": {40 if rank == 1 else 60}}}')


def renamed(source):
    arrays = {"step_num": np.array([3], np.int32)}
    write(source / "rank_0/x-step_00000002.ckpt", arrays, "I32")


def cut(source):
    content = (source / "rank_2/x.ckpt").read_bytes()
    (source / "rank_2/x.ckpt").write_bytes(content[: len(content) // 2])


def fewer_tensors(source):
    held = containers.open_tensors(source / "rank_2/x.ckpt")
    arrays = {name: held[name].array() for name in list(held)[:-1]}
    (source / "rank_2/x.ckpt").unlink()
    write(source / "rank_2/x.ckpt", arrays)


def strategy_of_other_plan(source):
    shutil.rmtree(source / "strategy")
    copy_strategy(source / "strategy", "1x4")


def strategy_of_fewer_cards(source):
    shutil.rmtree(source / "strategy")
    copy_strategy(source / "strategy", "1x2")


def two_strategies(source):
    copy_strategy(source / "strategy", "4x1", rank=2)


def strategy_is_none(source):
    (source / "strategy/ckpt_strategy_rank_0.ckpt").write_bytes(b"no protobuf at all")


def cut_strategy(source):
    for path in (source / "strategy").iterdir():
        path.write_bytes(path.read_bytes()[:3000])


def strategy_lost(source):
    shutil.rmtree(source / "strategy")


def no_strategies(source):
    for path in (source / "strategy").iterdir():
        path.unlink()


def two_files(source):
    shutil.copy(source / "rank_0/x.ckpt", source / "rank_0/y.ckpt")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_rank, "rank_1 is missing"),
        (lose_last_rank, r"on 4 card\(s\).*contains 3.*copy rank_3 too"),
        (empty_rank, "rank_1: contains no"),
        (other_step, "differs from its copy.*different runs or steps"),
        (steps_apart, "no checkpoint of step 2; steps found: 1, 2"),
        (cut, "rank_2/x.ckpt: incomplete or damaged"),
        (renamed, "contains step 3; give the file its original name"),
        (other_step_beside, "rank_1: has no checkpoint of step 60; steps found: 40, 60"),
        (fewer_tensors, "rank_2/x.ckpt: transformer.output_layer.weight does not match"),
        (strategy_of_other_plan, "not a complete GLM-4.*src_strategy"),
        (strategy_of_fewer_cards, r"on 2 card\(s\).*contains 4"),
        (two_strategies, "rank_2.ckpt: differs from"),
        (strategy_is_none, "not a strategy file"),
        (cut_strategy, "not a strategy file"),
        (strategy_lost, "strategy: no such folder"),
        (no_strategies, "--src_strategy"),
        (two_files, "have no step number; keep one"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, damage, said):
    source = write_shards(tmp_path / "source", "2x2", whole())
    damage(source)
    with pytest.raises(UserError, match=said) as error:
        run(source, tmp_path / "new/out", src_strategy=source / "strategy")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_one_rank_of_a_parallel_run_is_not_taken_for_the_whole(tmp_path):
    source = write_shards(tmp_path / "source", "1x2", whole())
    shutil.rmtree(source / "rank_1")
    with pytest.raises(UserError, match="not a complete GLM-4"):
        run(source, tmp_path / "out.ckpt")


def test_a_strategy_of_another_model_shares_nothing_out(tmp_path):
    small = {name: array for name, array in whole().items() if "layers.1." not in name}
    write(tmp_path / "one.ckpt", small)
    with pytest.raises(
        UserError, match=r"does not fit the checkpoint, see transformer\.encoder\.layers\.1"
    ):
        run(tmp_path / "one.ckpt", tmp_path / "out", dst_strategy=STRATEGIES / "2x2.ckpt")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "source", "2x2", whole())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"B needed, \d+\.\d\d [MK]B free"):
        run(source, tmp_path / "out.ckpt", src_strategy=source / "strategy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_values_that_are_no_numbers_are_refused(tmp_path):
    arrays = whole()
    arrays["transformer.output_layer.weight"][200, 3] = np.nan
    source = write_shards(tmp_path / "source", "2x2", arrays)
    with pytest.raises(UserError, match="output_layer.weight and 0 more hold NaN"):
        run(source, tmp_path / "out.ckpt", src_strategy=source / "strategy")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("fault", ["value", "place"])
def test_a_wrong_transformation_is_found(tmp_path, monkeypatch, fault):
    """One bit of one value differs from the shards, or two cards' files are swapped."""
    import mindspore as ms

    transform = ms.transform_checkpoint_by_rank

    def wrong(rank, files, out, *strategies):
        transform(rank ^ 1 if fault == "place" else rank, files, out, *strategies)
        if fault == "value" and rank == 2:
            content = bytearray(Path(out).read_bytes())
            content[-1] ^= 1
            Path(out).write_bytes(content)

    monkeypatch.setattr(ms, "transform_checkpoint_by_rank", wrong)
    write(tmp_path / "one.ckpt", whole())
    with pytest.raises(UserError, match="differ from the source|differs from its copy"):
        run(tmp_path / "one.ckpt", tmp_path / "out", dst_strategy=STRATEGIES / "2x2.ckpt")
    assert not (tmp_path / "out").exists()


def test_an_error_of_mindspore_is_one_line(tmp_path, monkeypatch):
    import mindspore as ms

    def fail(*_):
        raise RuntimeError("Failed to save the checkpoint file.\n---- C++ Call Stack ----")

    monkeypatch.setattr(ms, "transform_checkpoint_by_rank", fail)
    write(tmp_path / "one.ckpt", whole())
    with pytest.raises(UserError, match=r"\(Failed to save the checkpoint file\.\)") as error:
        run(tmp_path / "one.ckpt", tmp_path / "out", dst_strategy=STRATEGIES / "2x2.ckpt")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.ckpt"]


def test_places_that_cannot_be_written_to(tmp_path):
    write(tmp_path / "one.ckpt", whole())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("x")
    for target, options, said in (
        ("full", {"dst_strategy": STRATEGIES / "2x2.ckpt"}, "exists"),
        ("x.ckpt", {"dst_strategy": STRATEGIES / "2x2.ckpt"}, "is a folder; --format"),
        ("x.ckpt", {"format": "safetensors"}, "leave one of them out"),
        ("x", {"dst_strategy": tmp_path / "full"}, "holds no strategy file"),
        ("x", {"step": 3}, "--src_strategy and --step belong to a folder"),
        ("one.ckpt/x", {}, "cannot be written"),
    ):
        with pytest.raises(UserError, match=said):
            run(tmp_path / "one.ckpt", tmp_path / target, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "one.ckpt"]
