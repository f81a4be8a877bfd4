"""A training run: its data, its weights, and MindFormers' Trainer around them."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mindspore import nn
from mindspore.train.callback import Callback

from mindrlhf import cli, config, locks, runtime
from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.data import mindrecord
from mindrlhf.models.glm4 import build, load, sidecar
from mindrlhf.models.glm4.operations import model_operations
from mindrlhf.models.glm4.weight_names import is_adapter, is_base_weight
from mindrlhf.parallel import Plan
from mindrlhf.training import identity, state, train_step  # noqa: F401  registers the step
from mindrlhf.training.callbacks import BEST, DPOMonitor, EvalMonitor, Progress
from mindrlhf.training.evaluate import Evaluator
from mindrlhf.training.identity import Identity
from mindrlhf.training.inputs import Data, feed_of, open_data, open_rows, require_filled_batches
from mindrlhf.training.journal import Journal, read_records
from mindrlhf.training.saving import DPOCheckpointMonitor, check_optimizer_state


def finetune(settings: dict[str, Any], *, overwrite: bool = False,
             allow_changes: bool = False, finish: Callable[[], None] | None = None) -> None:
    """Train GLM-4 with DPO, as one worker of a run.

    MindFormers' Trainer builds the optimizer, runs the loop and calls our step and callbacks. In
    effect:

        for batch in dataset:                                        # data.dataset: packed rows
            loss, gradients = value_and_grad(Glm4DPO)(batch)         # training.train_step
            if isfinite(norm(gradients)): optimizer(clip(gradients))
            DPOMonitor            # checks the step, prints and records its metrics
            EvalMonitor           # evaluates held-out pairs if it is due
            DPOCheckpointMonitor  # saves a state if it is due, and at SIGTERM

    Args:
        settings: as config.load_settings returns them, of run_mode finetune.
        overwrite: remove an earlier run in output_dir.
        allow_changes: resume with other settings, data or weights than those of the state.
        finish: called on rank 0 when training is complete.

    Raises:
        UserError: data, weights, YAML, workers or the state to resume from do not match, output_dir
            holds another run, another run is writing there, or a step fails.
    """
    config.require_workers(settings, cli.workers())
    config.require_full_batch(settings, "train")
    with locks.hold(settings["output_dir"], is_folder=True):
        _finetune(settings, overwrite=overwrite, allow_changes=allow_changes)
        if finish and cli.rank() == 0:
            finish()
    runtime.end_worker()


def _finetune(settings: dict[str, Any], *, overwrite: bool, allow_changes: bool) -> None:
    """As finetune(), while no other run writes into output_dir."""
    data = open_data(settings)  # before the workers connect, so that errors come early
    resumed = open_state(settings)
    if not resumed or "lora" in settings:  # a state of LoRA has no base weights
        config.require_weights(settings)
    sidecar.require_same_model(resumed or settings.get("load_checkpoint"), settings)
    require_filled_batches(settings, data)
    run = begin_run(settings, data, resumed, overwrite=overwrite, allow_changes=allow_changes)
    if resumed:
        resumed = state.own_state(resumed)
        state.set_aside_later(settings["output_dir"], state.steps_done(resumed))
    run_config = config.to_mindformers(settings)
    runtime.start_device(run_config, parallel=cli.workers() > 1)
    model = build.build_network(run_config)
    load_policy(model, settings, data, resumed)
    if not resumed:
        sidecar.copy_to_run(settings["load_checkpoint"], settings["output_dir"])
    train(model, run_config, settings, data, run, resumed)


def open_state(settings: dict[str, Any]) -> Path | None:
    """A rank's training state to resume from (resume_training: a path, or auto), or None.

    Raises:
        UserError: the named state cannot be used.
    """
    requested = settings.get("resume_training") or None
    if not requested:
        return None
    folder = settings["output_dir"]
    path = state.choose_state(folder, requested)
    if path is None:
        cli.say(f"nothing to resume in {state.state_folder(folder)}: starting from the beginning")
        return None
    cli.say(f"resuming from {path}, step {state.steps_done(path)}")
    return path


def begin_run(settings: dict[str, Any], data: Data, resumed: Path | None, *, overwrite: bool,
              allow_changes: bool) -> Identity:
    """Make sure that this run mixes with no other: neither its folder, nor the state to resume.

    Args:
        settings: of the run.
        data: of the run.
        resumed: a rank's state to resume from, or None.
        overwrite: remove an earlier run in output_dir.
        allow_changes: resume with other settings, data or weights than those of the state.

    Raises:
        UserError: the state is another run's, or output_dir holds another run.
    """
    resume = bool(settings.get("resume_training"))
    if overwrite and resume:
        raise cli.UserError("--overwrite removes the run that --resume continues; give one of them")
    run = identity.describe_training(settings, data.train, data.eval)
    if resumed:
        saved = identity.identity_in(containers.open_tensors(resumed), resumed)
        run = identity.continue_run(resumed, saved, run, allow_changes=allow_changes)
    names = ("load_checkpoint", "src_strategy", "processor.tokenizer.vocab_file")
    read = [config.get_setting(settings, name) for name in names]
    identity.claim_folder(settings["output_dir"], run, resumed=resumed, resume=resume,
                          overwrite=overwrite, inputs=[*read, data.train_path, data.eval_path])
    return run


def load_policy(model: nn.Cell, settings: dict[str, Any], data: Data, resumed: Path | None) -> None:
    """Load the weights strictly, and check that they are those of the preprocessing.

    Args:
        model: Glm4DPO.
        settings: of the run.
        data: of the run.
        resumed: a state, or None. The weights of a state were checked when its run began.

    Raises:
        UserError: the weights do not fit the model, or (with dpo.check_reference) the data.
    """
    path, strategy = settings.get("load_checkpoint", ""), settings.get("src_strategy")
    sharded = Plan.of(settings).is_sharded  # if so, train() loads each card's part of a state
    if "lora" in settings:
        loaded = load.load_weights(model, path, names=is_base_weight, strategy=strategy)
        if resumed and not sharded:
            load.load_weights(model, resumed, training_state=True, names=is_adapter)
    elif resumed and not sharded:
        load.load_weights(model, resumed, training_state=True)
    elif not resumed:
        loaded = load.load_weights(model, path, strategy=strategy)
    if resumed or not settings["dpo"]["check_reference"]:
        return
    weights = fingerprints.fingerprint(loaded)
    for file, made in ((data.train_path, data.train), (data.eval_path, data.eval)):
        if file and made:
            mindrecord.require_made_for(file, made, seq_len=made["seq_len"],
                                        template=made["template"], tokenizer=None,
                                        checkpoint=weights)


def train(model: nn.Cell, run_config: Any, settings: dict[str, Any], data: Data, run: Identity,
          resumed: Path | None) -> None:
    """Train, with evaluations if there are held-out data.

    Args:
        model: Glm4DPO with its weights.
        run_config: MindFormerConfig of the settings, after runtime.start_device.
        settings: of the run.
        data: of the run.
        run: its identity.
        resumed: the state to resume from, or None.

    Raises:
        UserError: the state has reached the end of the run already, or a step fails.
    """
    from mindformers import Trainer
    feed = feed_of(settings)
    runtime.seed_dataset(settings["seed"])
    shuffle = config.get_setting(settings, "train_dataset.data_loader.shuffle", True)
    dataset = open_rows(data.train_path, data.train, feed, shuffle=shuffle)
    epoch, runner = dataset.get_dataset_size(), settings["runner_config"]
    total = min(epoch * runner["epochs"], runner.get("max_steps", 0) or math.inf)
    first = state.steps_done(resumed) if resumed else 0
    if first >= total:
        raise cli.UserError(f"{resumed}: is at step {first} of {total}, so the run is complete; "
                            "raise runner_config.epochs to train further")
    cli.say(f"{data.train_path}: {data.train['pairs']['written']} pairs in {data.train['rows']} "
            f"rows of {data.train['seq_len']}; {feed.batch_size * feed.shards} rows a step, "
            f"{epoch} steps an epoch, {total} in total; rows shuffled: {shuffle}, "
            f"seed {settings['seed']}")
    given = config.get_setting(settings, "lr_schedule.total_steps", -1)
    run_config.lr_schedule.total_steps = total if given == -1 else given
    journal = Journal(settings["output_dir"], first) if cli.rank() == 0 else None
    progress = Progress(first=first, total=total, epoch_steps=epoch,
                        tokens=journal.last("num_tokens", 0) if journal else 0)
    callbacks = make_callbacks(model, settings, data, progress, journal, run, resumed)
    if resumed:
        resume_trainer(settings, resumed, first)
    trainer = Trainer(args=run_config, task="text_generation", model=model, train_dataset=dataset,
                      callbacks=callbacks)
    trainer.finetune(finetune_checkpoint=str(resumed) if resumed else False,
                     resume_training=bool(resumed), auto_trans_ckpt=False)
    if journal:
        journal.close()
    output = Path(settings["output_dir"])
    curves = ", curves.png" if (output / "curves.png").exists() else ""
    cli.say(f"weights: {output / 'checkpoint_network'}; states, metrics.jsonl, "
            f"tensorboard{curves}: {output}")


def resume_trainer(settings: dict[str, Any], resumed: Path, steps: int) -> None:
    """Prepare MindFormers' Trainer to continue from a state.

    Args:
        settings: of the run.
        resumed: the state of this rank.
        steps: optimizer steps behind it.
    """
    runtime.resume_after(steps)
    if Plan.of(settings).is_sharded:
        saved = (lambda name: not is_base_weight(name)) if "lora" in settings else None
        runtime.load_states_with(partial(state.load_own_part, resumed, names=saved))


def make_callbacks(model: nn.Cell, settings: dict[str, Any], data: Data, progress: Progress,
                   journal: Journal | None, run: Identity, resumed: Path | None
                   ) -> list[Callback]:
    """The callbacks of a run, in the order in which they act: check, evaluate, save, stop.

    Args:
        model: Glm4DPO.
        settings: of the run.
        data: of the run.
        progress: shared by the callbacks.
        journal: on rank 0, else None.
        run: its identity.
        resumed: the state to resume from, or None.
    """
    options, dpo = config.callback_options(settings), settings["dpo"]
    saver = DPOCheckpointMonitor(
        progress, journal, model, output_dir=settings["output_dir"], run=run,
        lora=settings.get("lora"), **options["DPOCheckpointMonitor"])
    check = dpo["check_reference"] and not resumed
    chain: list[Callback] = [DPOMonitor(
        progress, journal, sft_weight=dpo["sft_weight"],
        tolerance=dpo["reference_tolerance"] if check else None,
        operations=model_operations(settings), cards=cli.workers(), **options["DPOMonitor"])]
    if data.eval_path and data.eval:
        evaluation = options.get("EvalMonitor", {})
        metric = evaluation.get("best_metric", "loss")
        parts = settings["runner_config"].get("gradient_accumulation_steps", 1)
        feed = feed_of(settings)
        feed = replace(feed, batch_size=feed.batch_size // parts)  # evaluation accumulates nothing
        held_out = open_rows(data.eval_path, data.eval, feed, shuffle=False)
        chain.append(EvalMonitor(
            progress, journal, Evaluator(model, held_out, dpo["sft_weight"]), **evaluation,
            best=best_so_far(settings["output_dir"], progress.first, metric),
            keep_best=lambda: saver.save_weights("checkpoint_best", f"{saver.prefix}-best.ckpt")))
    return [*chain, saver, _Stop(progress, resumed)]


def best_so_far(output_dir: str | Path, step: int, metric: str) -> float | None:
    """Best value of a metric among the evaluations up to a step, or None.

    Args:
        output_dir: of the run.
        step: steps behind the state that the run resumes from; 0 for a new run.
        metric: a key of BEST.
    """
    path = Path(output_dir) / "metrics.jsonl"
    if not step or not path.exists():
        return None
    values = [record[metric] for record in read_records(path, before=step)
              if record["split"] == "eval" and record["step"]
              and isinstance(record.get(metric), (int, float))]  # NaN is null in JSON
    return max(values, key=lambda value: BEST[metric] * value, default=None)


class _Stop(Callback):
    """Checks that a state fills the entire optimizer, and ends training at the last step."""

    def __init__(self, progress: Progress, resumed: Path | None) -> None:
        super().__init__()
        self.progress, self.resumed = progress, resumed

    def on_train_begin(self, run_context: Any) -> None:
        """Check the state."""
        if self.resumed:
            check_optimizer_state(run_context.original_args().network.optimizer, self.resumed)

    def on_train_step_end(self, run_context: Any) -> None:
        """Stop at the last step."""
        if self.progress.step >= self.progress.total:
            run_context.request_stop()
