"""DPO training, and prediction: what it does is the YAML's run_mode, finetune or predict."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mindrlhf.checkpoints.strict
from mindrlhf import cli, config

EXAMPLE = """  bash ../../scripts/msrun_launcher.sh "run_dpo.py --config finetune_glm4_9b.yaml --train_dataset dpo.mindrecord \\
    --vocab_file tokenizer.model --load_checkpoint glm4_9b.ckpt --auto_trans_ckpt True" 8
  python run_dpo.py --config predict_glm4_9b.yaml --load_checkpoint merged.ckpt --auto_trans_ckpt False \\
    --vocab_file tokenizer.model --predict_data "How do I apologize?\""""


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--config", required=True, help="YAML with run_mode finetune or predict")
    parse.add_argument("--train_dataset", help="finetune: .mindrecord that the preprocessing wrote")
    parse.add_argument("--eval_dataset", help="finetune: .mindrecord of held-out pairs, measured before and after")
    parse.add_argument("--vocab_file", help="tokenizer.model of the model")
    parse.add_argument("--load_checkpoint", help="finetune: the weights that preprocessed the data; predict: any")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="share the checkpoint, one whole file or shards, out over the cards of the parallel plan")
    parse.add_argument("--src_strategy", help="where load_checkpoint or adapter_checkpoint is a folder of shards, rank_0, "
                                              "rank_1, ...: output/strategy of the run that saved them")
    parse.add_argument("--adapter_checkpoint", help="predict: LoRA adapters on top of load_checkpoint: "
                       "output/checkpoint_network of their training, or one file")
    parse.add_argument("--predict_data", metavar="TEXT", help="predict: what the user says")
    parse.add_argument("--resume", metavar="auto|FILE", help="finetune: go on from the last whole state in output_dir, or "
                       "from a file of output/checkpoint/rank_0")
    parse.add_argument("--output_dir", help="where checkpoints, strategies and metrics go (default: ./output)")
    return parse


def load_settings(arguments):
    return config.load(arguments.config, run_mode=("finetune", "predict"), overrides={
        "load_checkpoint": arguments.load_checkpoint, "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy,
        "train_dataset.data_loader.dataset_dir": arguments.train_dataset,
        "eval_dataset.data_loader.dataset_dir": arguments.eval_dataset,
        "processor.tokenizer.vocab_file": arguments.vocab_file, "output_dir": arguments.output_dir,
        "resume_training": arguments.resume})


def finetune(settings):
    """Train: MindFormers' Trainer on Glm4DPO, from weights that are loaded strictly and data that fit them."""
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import sidecar
    from mindrlhf.training import run

    config.check_workers(settings, cli.workers())
    data = run.open_data(settings)  # says what is wrong before the workers meet
    resumed = run.find_state(settings)
    if not resumed:
        config.check_weights(settings)
    sidecar.check(resumed or settings.get("load_checkpoint"), settings)
    run_config = config.to_mindformers(settings)
    runtime.start(run_config, parallel=cli.workers() > 1)
    model = runtime.build_network(run_config)
    run.load_weights(model, settings, data, resumed)
    if not resumed:
        sidecar.keep(settings["load_checkpoint"], settings["output_dir"])
    run.train(model, run_config, settings, data, resumed)
    runtime.finish()


def predict(settings, text, adapters=None):
    """Print the answer to one message."""
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import lora, sidecar, template
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    if text is None:
        raise cli.UserError("run_mode predict needs --predict_data TEXT")
    runtime.quiet()
    sidecar.check(settings.get("load_checkpoint"), settings)
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    numbers = settings["model"]["model_config"]
    tokenizer.check_vocabulary(numbers["padded_vocab_size"])
    prompt = template.prompt_ids(tokenizer, [("user", text)])
    room = numbers["seq_length"] - len(prompt)
    if room < 1:
        raise cli.UserError(f"--predict_data is {len(prompt)} tokens, seq_length {numbers['seq_length']}; shorten it")
    config.check_weights(settings)
    path, strategy = settings["load_checkpoint"], settings.get("src_strategy")
    if strategy and adapters and Path(path).is_dir() and Path(adapters).is_dir():
        raise cli.UserError(f"--src_strategy: {path} and {adapters} are both folders of shards; merge one of them first")
    with cli.quiet_stdout():
        run_config = config.to_mindformers(settings)
        runtime.start(run_config, parallel=False)
        model = runtime.build_network(run_config)
        base = mindrlhf.checkpoints.strict.load_strictly(model, path, strategy=strategy if Path(path).is_dir() or not adapters else None)
        if adapters:
            stored = mindrlhf.checkpoints.strict.open_adapters(adapters, strategy if not Path(path).is_dir() else None)
            runtime.set_values(model, lora.merged(base, stored, adapters))
        output = model.generate([prompt], max_new_tokens=min(numbers.get("max_decode_length", 512), room),
                                eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id)[0]
    print(tokenizer.decode(output[len(prompt):]).strip(), flush=True)


def main(argv=None):
    arguments = parser().parse_args(argv)
    settings = load_settings(arguments)
    if settings["run_mode"] == "finetune":
        finetune(settings)
    else:
        predict(settings, arguments.predict_data, arguments.adapter_checkpoint)


if __name__ == "__main__":
    cli.run(main)
