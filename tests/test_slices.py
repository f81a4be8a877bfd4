"""Weights for a running plan: each card reads its part of one file, or of another plan's shards."""

import dpo_preprocess_glm4_parallel as preprocess
import mindspore as ms
import numpy as np
import pytest
import run_dpo
from conftest import load_model
from test_preprocess import arguments, rows
from test_transform_checkpoint import STRATEGIES, by_hand, cards, whole, write, write_shards

from mindrlhf import config
from mindrlhf.checkpoints import containers, layouts, slices
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord
from mindrlhf.models.glm4 import load, sidecar, weight_names
from mindrlhf.training import inputs, run

PLANS = ("2x2", "1x4", "4x1", "1x2")


# a card's part


@pytest.mark.parametrize("shape", [(5, 7), (10, 7)])
def test_block_of_a_card_by_hand(shape):
    """A (30, 14) tensor on 12 cards: model parallelism makes 3 x 2 parts of (10, 7); part 3 is row
    1, column 1, so rows 10..19 and columns 7..13. Two cards hold it and split its rows: the second
    has 15..19. MindSpore adds 12 cards and place 1 to the number, and passes the shape before or
    after that split.
    """
    block = slices.find_block((30, 14), shape, 3 + 12 + 1, cards=12, group=(2, 1))
    assert block == (slice(15, 20), slice(7, 14))
    assert slices.find_block((30, 14), (10, 7), 3, cards=6) == (slice(10, 20), slice(7, 14))
    assert slices.find_block((30, 14), (30, 14), 0, cards=6) == (slice(0, 30), slice(0, 14))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", ["file", "shards"])
def test_every_card_reads_its_part(tmp_path, monkeypatch, plan, source):
    """Calls as MindSpore makes them when it compiles; they follow by hand from the plan's
    definition.
    """
    arrays = whole()
    if source == "file":
        write(tmp_path / "one.safetensors", arrays)
        stored = load.open_weights(tmp_path / "one.safetensors")
    else:
        folder = write_shards(tmp_path, "2x2", arrays)
        stored = load.open_weights(folder, folder / "strategy")
    data, model = map(int, plan.split("x"))
    monkeypatch.setattr(
        slices, "get_group_size", lambda group=None: data if group == "data" else cards(plan)
    )
    for rank in range(cards(plan)):
        data_place, model_place = divmod(rank, model)
        for name, array in arrays.items():
            held = by_hand(plan, name, array, rank)
            index, group, place = model_place, "data" if data > 1 else None, data_place
            if "output_layer" in name:
                index, group = rank, None
            elif "norm" in name:  # no part of it by model parallelism, so all cards may share it
                index, group, place = 0, "all", rank
            if held.size * cards(plan) > array.size:  # several cards hold it
                group = None
            monkeypatch.setattr(slices, "get_rank", lambda group, place=place: place)
            index += cards(plan) + place if group else 0
            part = slices.FileTensor(stored[name], ms.float32).init_data(
                index, list(held.shape), group
            )
            assert np.array_equal(part.asnumpy(), held), (name, rank)


# complete commands


def strategy_of_three_layers(folder):
    """The 1x2 strategy, with a third layer like the second."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    content = ParallelStrategyMap()
    content.ParseFromString((STRATEGIES / "1x2.ckpt").read_bytes())
    for item in list(content.parallel_layout_item):
        if ".layers.1." in item.param_name:
            more = content.parallel_layout_item.add()
            more.CopyFrom(item)
            more.param_name = item.param_name.replace(".layers.1.", ".layers.2.")
    folder.mkdir()
    (folder / "ckpt_strategy_rank_0.ckpt").write_bytes(content.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def shared(golden):
    """The golden weights in two shards as a run leaves them, and its strategy."""
    output, stored = golden.folder / "sharded", containers.open_tensors(golden.checkpoint)
    for rank in range(2):
        write(
            output / f"checkpoint_network/rank_{rank}/glm4_dpo-network.ckpt",
            {name: by_hand("1x2", name, tensor.array(), rank) for name, tensor in stored.items()},
        )
    sidecar.copy_to_run(golden.checkpoint, output)
    return output / "checkpoint_network", strategy_of_three_layers(output / "strategy")


def from_shards(golden, shared, destination, *more):
    return [
        *arguments(golden, golden.pairs, destination),
        "--load_checkpoint",
        str(shared[0]),
        "--auto_trans_ckpt",
        "True",
        "--src_strategy",
        str(shared[1]),
        *more,
    ]


def test_preprocessing_from_shards_gives_what_one_file_gives(golden, shared, tmp_path):
    preprocess.main(from_shards(golden, shared, tmp_path / "x.mindrecord"))
    one, other = (
        mindrecord.read_data_sidecar(path) for path in (golden.data, tmp_path / "x.mindrecord")
    )
    assert other["checkpoint"]["fingerprint"] == one["checkpoint"]["fingerprint"]
    for left, right in zip(rows(golden.data), rows(tmp_path / "x.mindrecord")):
        assert all(np.array_equal(left[name], right[name]) for name in left)
    left = sorted(path.name for path in shared[0].parent.rglob("*"))
    assert (
        len(left) == 8
    )  # nothing new: 2 x (folder, file), their folder, strategy, its file, model.json


def test_training_from_shards_knows_the_weights_of_the_preprocessing(golden, shared, monkeypatch):
    settings = config.load_settings(
        golden.finetune,
        run_mode="finetune",
        overrides={
            "load_checkpoint": str(shared[0]),
            "src_strategy": str(shared[1]),
            "auto_trans_ckpt": True,
            "processor.tokenizer.vocab_file": str(golden.tokenizer),
            "train_dataset.data_loader.dataset_dir": str(golden.data),
        },
    )
    data = inputs.open_data(settings)
    model = load_model(golden, "finetune")
    for parameter in model.get_parameters():
        parameter.set_data(ms.ops.zeros_like(parameter))
    run.load_policy(model, settings, data, None)
    stored = containers.open_tensors(golden.checkpoint)
    assert all(np.array_equal(p.asnumpy(), stored[p.name].array()) for p in model.get_parameters())
    sidecar.require_same_model(
        settings["load_checkpoint"], settings
    )  # the run's model.json has the YAML's numbers

    data.train["checkpoint"]["fingerprint"] = "0" * 64
    with pytest.raises(UserError, match="checkpoint"):
        run.load_policy(model, settings, data, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--auto_trans_ckpt": "False"}, "need --auto_trans_ckpt True and --src_strategy"),
        ({"--src_strategy": None}, "is not a complete GLM-4.*--src_strategy"),
        ({"--src_strategy": str(STRATEGIES / "1x2.ckpt")}, "is of another model"),
        ({"--src_strategy": str(STRATEGIES / "2x2.ckpt")}, r"on 4 card\(s\).*contains 2"),
        ({"--load_checkpoint": "whole"}, "is one file; --src_strategy"),
    ],
)
@pytest.mark.parametrize("command", ["preprocess", "finetune"])
def test_shards_that_cannot_be_shared_out_are_refused(
    golden, shared, tmp_path, command, change, said
):
    options = {
        "--config": golden.process,
        "--load_checkpoint": shared[0],
        "--auto_trans_ckpt": "True",
        "--src_strategy": shared[1],
    }
    if command == "preprocess":
        options |= {
            "--src": golden.pairs,
            "--dst": tmp_path / "x.mindrecord",
            "--tokenizer": golden.tokenizer,
        }
    else:
        options |= {
            "--config": golden.finetune,
            "--train_dataset": golden.data,
            "--vocab_file": golden.tokenizer,
            "--output_dir": tmp_path / "out",
        }
    options |= change
    if options["--load_checkpoint"] == "whole":
        options["--load_checkpoint"] = golden.checkpoint
    with pytest.raises(UserError, match=said):
        {"preprocess": preprocess, "finetune": run_dpo}[command].main(
            [
                str(text)
                for option, value in options.items()
                if value is not None
                for text in (option, value)
            ]
        )
    assert not list(tmp_path.glob("x.mindrecord"))


def test_shards_of_another_model_do_not_load(golden, shared, tmp_path):
    folder = write_shards(tmp_path, "1x2", whole())
    with pytest.raises(
        UserError,
        match=r"does not fit the model of this YAML. missing: "
        r"transformer\.encoder\.layers\.2",
    ):
        load.load_weights(load_model(golden, "predict"), folder, strategy=folder / "strategy")


def test_a_strategy_file_of_a_run_is_found_in_its_folder(tmp_path, shared):
    assert layouts.find_strategy(shared[1]) == shared[1] / "ckpt_strategy_rank_0.ckpt"
    assert layouts.find_strategy(None) is None
    numbers = sidecar.read_config_of(shared[0]).config
    assert weight_names.parameter_shapes(numbers)["transformer.output_layer.weight"] == (330, 96)
