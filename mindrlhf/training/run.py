"""A training run: its data, its weights, and MindFormers' Trainer around them."""
from dataclasses import dataclass
from pathlib import Path

from mindrlhf import backend, checkpoint, cli, config
from mindrlhf.data import mindrecord
from mindrlhf.data.dataset import open_dataset
from mindrlhf.models.glm4 import template
from mindrlhf.training import callbacks, wrapper  # noqa: F401  wrapper registers the training step
from mindrlhf.training.evaluate import evaluate


@dataclass(frozen=True)
class Data:
    """Paths and sidecars of what a run reads; eval_* are None without --eval_dataset."""
    train_path: str
    train: dict
    eval_path: str | None
    eval: dict | None


def open_data(settings):
    """Find the data of a run and check that they fit its YAML and tokenizer.

    Raises:
        UserError: a file is missing, or was made otherwise.
    """
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    path = config.get(settings, "train_dataset.data_loader.dataset_dir")
    if not path:
        raise cli.UserError("no training data given; --train_dataset names what the preprocessing wrote")
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])
    eval_path = config.get(settings, "eval_dataset.data_loader.dataset_dir") or None
    sidecars = {}
    for each in filter(None, (path, eval_path)):
        sidecars[each] = mindrecord.read_sidecar(each)
        mindrecord.check_made_for(each, sidecars[each], seq_len=settings["model"]["model_config"]["seq_length"],
                                  template=template.VERSION, tokenizer=tokenizer.fingerprint, checkpoint=None)
    return Data(path, sidecars[path], eval_path, sidecars.get(eval_path))


def load_weights(model, settings, data):
    """Load the weights strictly, and make sure that they are those of the preprocessing.

    Raises:
        UserError: they are others, unless dpo.check_reference is False or the run goes on from a checkpoint.
    """
    resumed = settings.get("resume_training", False)
    loaded = checkpoint.load_strictly(model, settings.get("load_checkpoint"), training_state=resumed)
    if resumed or not settings["dpo"]["check_reference"]:
        return
    identity = checkpoint.fingerprint(loaded)
    for path, sidecar in ((data.train_path, data.train), (data.eval_path, data.eval)):
        if sidecar:
            mindrecord.check_made_for(path, sidecar, seq_len=sidecar["seq_len"], template=sidecar["template"],
                                      tokenizer=None, checkpoint=identity)


def train(model, run_config, settings, data):
    """Train, with an evaluation before and after where there are held-out data.

    Args:
        model: Glm4DPO with its weights.
        run_config: MindFormerConfig after backend.start().
        settings: the same as dicts, as config.load gave them.
        data: Data.
    """
    from mindformers import Trainer
    semi = settings["parallel"]["parallel_mode"] == 1
    rows = settings["runner_config"]["batch_size"]
    if semi:  # every card is fed the whole batch and takes its part of it
        feed = {"batch_size": rows * settings["parallel_config"]["data_parallel"], "shards": 1, "shard": 0}
    else:
        feed = {"batch_size": rows, "shards": cli.workers(), "shard": cli.rank()}
    backend.seed_dataset(settings["seed"])
    shuffle = config.get(settings, "train_dataset.data_loader.shuffle", True)
    dataset = open_dataset(data.train_path, data.train, shuffle=shuffle, **feed)
    steps = dataset.get_dataset_size()
    total = steps * settings["runner_config"]["epochs"]
    global_rows = feed["batch_size"] * feed["shards"]
    cli.say(f"{data.train_path}: {data.train['pairs']['written']} pairs in {data.train['rows']} rows of "
            f"{data.train['seq_len']}; {global_rows} rows a step, {steps} steps an epoch, {total} in all; "
            f"rows shuffled: {shuffle}, seed {settings['seed']}")

    resumed = settings.get("resume_training", False)
    first = checkpoint.steps_done(settings["load_checkpoint"]) if resumed else 0
    metrics_path = Path(settings["output_dir"]) / "metrics.jsonl"
    check = settings["dpo"]["check_reference"] and not resumed
    for callback in run_config.callbacks:
        if callback["type"] == "DPOMonitor":
            callback.update(path=str(metrics_path), sft_weight=settings["dpo"]["sft_weight"], total_steps=total,
                            tolerance=settings["dpo"]["reference_tolerance"] if check else None, first_step=first)
    extra = []
    if data.eval:
        held_out = open_dataset(data.eval_path, data.eval, shuffle=False, **feed)
        extra.append(callbacks.EvalMonitor(model, held_out, settings["dpo"]["sft_weight"], metrics_path))

    trainer = Trainer(args=run_config, task="text_generation", model=model, train_dataset=dataset, callbacks=extra)
    path = settings["load_checkpoint"] if resumed else False
    trainer.finetune(finetune_checkpoint=path, resume_training=resumed, auto_trans_ckpt=False)
    cli.say(f"checkpoints: {Path(settings['output_dir']) / 'checkpoint_network'}, metrics: {metrics_path}")
