"""A training run: its data, its weights, and MindFormers' Trainer around them."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mindspore.train.callback import Callback

from mindrlhf import cli, config, runtime
from mindrlhf.checkpoints import fingerprints
from mindrlhf.data import mindrecord
from mindrlhf.data.dataset import open_dataset
from mindrlhf.models.glm4 import build, load, sidecar, template
from mindrlhf.models.glm4.weight_names import is_adapter, is_base_weight
from mindrlhf.parallel import Plan
from mindrlhf.training import state, train_step  # noqa: F401  wrapper registers the training step
from mindrlhf.training.callbacks import BEST, DPOMonitor, EvalMonitor, Progress
from mindrlhf.training.evaluate import Evaluator
from mindrlhf.training.journal import Journal, read_records
from mindrlhf.training.saving import DPOCheckpointMonitor, check_optimizer_state


@dataclass(frozen=True)
class Data:
    """Paths and sidecars of what a run reads; eval_* are None without --eval_dataset."""
    train_path: str
    train: dict
    eval_path: str | None
    eval: dict | None


def finetune(settings):
    """Train GLM-4 with DPO, as one worker of a run.

    MindFormers' Trainer builds the optimizer and calls our step and our callbacks:

        for batch in dataset:                        # packed rows, data.dataset.open_dataset
            loss, gradients = value_and_grad(Glm4DPO)(batch)    # training.train_step
            if norm(gradients) is finite: optimizer(clip(gradients))
            DPOMonitor          checks the step, prints and records its metrics
            EvalMonitor         evaluates held-out pairs where it is due
            DPOCheckpointMonitor saves a state where it is due, and at SIGTERM

    Args:
        settings: as config.load() returns them, of run_mode finetune.

    Raises:
        UserError: data, weights, YAML, workers or a state to resume from do not belong together, or a step fails.
    """
    config.require_workers(settings, cli.workers())
    data = open_data(settings)  # says what is wrong before the workers meet
    resumed = open_state(settings)
    if not resumed:
        config.require_weights(settings)
    sidecar.require_same_model(resumed or settings.get("load_checkpoint"), settings)
    run_config = config.to_mindformers(settings)
    runtime.start_device(run_config, parallel=cli.workers() > 1)
    model = build.build_network(run_config)
    load_policy(model, settings, data, resumed)
    if not resumed:
        sidecar.copy_to_run(settings["load_checkpoint"], settings["output_dir"])
    train(model, run_config, settings, data, resumed)
    runtime.end_worker()


def open_data(settings):
    """Find the data of a run and check that they fit its YAML and tokenizer.

    Raises:
        UserError: a file is missing, or was made otherwise.
    """
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    path = config.get_setting(settings, "train_dataset.data_loader.dataset_dir")
    if not path:
        raise cli.UserError("no training data given; --train_dataset names what the preprocessing wrote")
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])
    eval_path = config.get_setting(settings, "eval_dataset.data_loader.dataset_dir") or None
    sidecars = {}
    for each in filter(None, (path, eval_path)):
        sidecars[each] = mindrecord.read_data_sidecar(each)
        mindrecord.require_made_for(each, sidecars[each], seq_len=settings["model"]["model_config"]["seq_length"],
                                  template=template.VERSION, tokenizer=tokenizer.fingerprint, checkpoint=None)
    return Data(path, sidecars[path], eval_path, sidecars.get(eval_path))


def open_state(settings):
    """The training state to go on from (resume_training: a path, or auto), or None.

    Raises:
        UserError: the one that is named cannot be used.
    """
    wish = settings.get("resume_training") or None
    if not wish:
        return None
    path = state.choose_state(settings["output_dir"], wish)
    if path:
        state.set_aside_later(settings["output_dir"], state.steps_done(path))
    cli.say(f"resuming from {path}, step {state.steps_done(path)}" if path else
            f"nothing to resume in {state.state_folder(settings['output_dir'])}: starting from the beginning")
    return path


def load_policy(model, settings, data, resumed):
    """Load the weights strictly, and make sure that they are those of the preprocessing.

    Args:
        model: Glm4DPO.
        settings: of the run.
        data: Data.
        resumed: path of a state, or None. Its weights were checked when their run began.

    Raises:
        UserError: they are others, unless dpo.check_reference is False.
    """
    sharded = Plan.of(settings).is_sharded  # then each card has its part of a state, which train() loads
    if "lora" in settings:
        loaded = load.load_weights(model, settings.get("load_checkpoint"), names=is_base_weight,
                                          strategy=settings.get("src_strategy"))
        if resumed and not sharded:
            load.load_weights(model, resumed, training_state=True, names=is_adapter)
    elif not (resumed and sharded):
        loaded = load.load_weights(model, resumed or settings.get("load_checkpoint"), training_state=bool(resumed),
                                          strategy=None if resumed else settings.get("src_strategy"))
    if resumed:
        return
    if not settings["dpo"]["check_reference"]:
        return
    identity = fingerprints.fingerprint(loaded)
    for path, made in ((data.train_path, data.train), (data.eval_path, data.eval)):
        if made:
            mindrecord.require_made_for(path, made, seq_len=made["seq_len"], template=made["template"],
                                      tokenizer=None, checkpoint=identity)


def feed_of(settings):
    """How the workers are fed: batch_size (rows that one reads for a step), shards and shard of the data."""
    runner = settings["runner_config"]
    rows = runner["batch_size"] * runner.get("gradient_accumulation_steps", 1)
    if Plan.of(settings).is_sharded:  # every card is fed the whole batch and takes its part of it
        return {"batch_size": rows * settings["parallel_config"]["data_parallel"], "shards": 1, "shard": 0}
    return {"batch_size": rows, "shards": cli.workers(), "shard": cli.rank()}


def train(model, run_config, settings, data, resumed):
    """Train, with evaluations where there are held-out data.

    Args:
        model: Glm4DPO with its weights.
        run_config: MindFormerConfig after backend.start().
        settings: the same as dicts, as config.load gave them.
        data: Data.
        resumed: path of the state to go on from, or None.
    """
    from mindformers import Trainer
    feed = feed_of(settings)
    runtime.seed_dataset(settings["seed"])
    shuffle = config.get_setting(settings, "train_dataset.data_loader.shuffle", True)
    dataset = open_dataset(data.train_path, data.train, shuffle=shuffle, **feed)
    epoch, epochs = dataset.get_dataset_size(), settings["runner_config"]["epochs"]
    total = min(epoch * epochs, settings["runner_config"].get("max_steps", 0) or math.inf)
    progress = Progress(first=state.steps_done(resumed) if resumed else 0, total=total)
    if progress.first >= total:
        raise cli.UserError(f"{resumed}: has {progress.first} steps, the run {total}; it is done, or raise epochs")
    cli.say(f"{data.train_path}: {data.train['pairs']['written']} pairs in {data.train['rows']} rows of "
            f"{data.train['seq_len']}; {feed['batch_size'] * feed['shards']} rows a step, {epoch} steps an epoch, {total} in "
            f"all; rows shuffled: {shuffle}, seed {settings['seed']}")
    run_config.lr_schedule.total_steps = total
    journal = Journal(settings["output_dir"], progress.first) if cli.rank() == 0 else None
    callbacks = make_callbacks(model, settings, data, progress, journal, resumed)
    if resumed:
        runtime.resume_after(progress.first)
    if resumed and Plan.of(settings).is_sharded:
        saved = (lambda name: not is_base_weight(name)) if "lora" in settings else None
        runtime.load_states_with(partial(state.load_own_part, resumed, names=saved))
    trainer = Trainer(args=run_config, task="text_generation", model=model, train_dataset=dataset, callbacks=callbacks)
    trainer.finetune(finetune_checkpoint=str(resumed) if resumed else False, resume_training=bool(resumed),
                     auto_trans_ckpt=False)
    if journal:
        journal.close()
    cli.say(f"weights: {Path(settings['output_dir']) / 'checkpoint_network'}; states, metrics.jsonl, curves.png and "
            f"tensorboard: {settings['output_dir']}")


def make_callbacks(model, settings, data, progress, journal, resumed):
    """The callbacks of a run, in the order in which they act after a step: check, evaluate, save, stop."""
    options = {entry["type"]: {key: value for key, value in entry.items() if key != "type"}
               for entry in settings["callbacks"]}
    dpo = settings["dpo"]
    saver = DPOCheckpointMonitor(progress, journal, model, output_dir=settings["output_dir"],
                                 lora=settings.get("lora"), **options["DPOCheckpointMonitor"])
    check = dpo["check_reference"] and not resumed
    chain = [DPOMonitor(progress, journal, sft_weight=dpo["sft_weight"],
                        tolerance=dpo["reference_tolerance"] if check else None, **options["DPOMonitor"])]
    if data.eval:
        evaluation = options.get("EvalMonitor", {})
        metric = evaluation.get("best_metric", "loss")
        feed = {**feed_of(settings), "batch_size": feed_of(settings)["batch_size"] //
                settings["runner_config"].get("gradient_accumulation_steps", 1)}
        held_out = open_dataset(data.eval_path, data.eval, shuffle=False, **feed)
        chain.append(EvalMonitor(
            progress, journal, Evaluator(model, held_out, dpo["sft_weight"]), **evaluation,
            best=best_so_far(settings["output_dir"], progress.first, metric),
            keep_best=lambda: saver.save_weights("checkpoint_best", f"{saver.prefix}-best.ckpt")))
    return [*chain, saver, _Stop(progress, resumed)]


def best_so_far(output_dir, step, metric):
    """Best value of a metric in the evaluations that a resumed run has behind it, or None."""
    path = Path(output_dir) / "metrics.jsonl"
    values = [record[metric] for record in read_records(path, before=step) if record["split"] == "eval" and record["step"]] \
        if step and path.exists() else []
    return max(values, key=lambda value: BEST[metric] * value, default=None)


class _Stop(Callback):
    """Checks that a state fills the whole optimizer, and ends training at the last step (max_steps)."""

    def __init__(self, progress, resumed):
        super().__init__()
        self.progress, self.resumed = progress, resumed

    def on_train_begin(self, run_context):
        """Check the state."""
        if self.resumed:
            check_optimizer_state(run_context.original_args().network.optimizer, self.resumed)

    def on_train_step_end(self, run_context):
        """Stop at the end."""
        if self.progress.step >= self.progress.total:
            run_context.request_stop()
