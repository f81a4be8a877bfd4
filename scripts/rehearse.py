"""What rehearse.sh cannot say in bash: shrink a training YAML, compare two runs, and explain what failed."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import yaml

from mindrlhf import checkpoint, cli, config

TOLERANCE = 1e-4  # relative, of losses, rewards and gradient norms
HEAD, LAYERS, POSITIONS, VOCABULARY = 8, 2, 128, 528  # kv_channels, num_layers, seq_length, padded_vocab_size at least


def illegal(settings, cards):
    """What is wrong with the plan of a YAML on so many cards, in words: a list of sentences."""
    model, plan = settings["model"]["model_config"], settings.get("parallel_config", {})
    data, width = plan.get("data_parallel", 1), plan.get("model_parallel", 1)
    sizes = {"hidden_size": width, "ffn_hidden_size": width, "num_attention_heads": width}
    if not plan.get("vocab_emb_dp"):
        sizes["padded_vocab_size"] = data * width
    problems = [f"{name} is {model[name]}, which {parts} card(s) cannot share evenly" for name, parts in sizes.items()
                if model[name] % parts]
    if data * width != cards:
        problems.append(f"data_parallel {data} x model_parallel {width} = {data * width} cards, not {cards}")
    return problems


def shrink(path, cards, folder):
    """Write many.yaml, one.yaml, process.yaml and predict.yaml: the plan, no plan, and the commands around.

    Raises:
        UserError: the YAML is not one of a semi-auto parallel training.
    """
    settings = config.load(path, run_mode="finetune")
    if not config.sharded(settings):
        raise cli.UserError(f"{path}: has parallel.parallel_mode 0, so there is no plan to rehearse; a plan has 1")
    if problems := illegal(settings, cards):
        print(f"the plan is illegal: {'; '.join(problems)}")
        sys.exit(1)
    model, plan = settings["model"]["model_config"], settings["parallel_config"]
    hidden = HEAD * model["num_attention_heads"]
    small = {"num_layers": LAYERS, "kv_channels": HEAD, "hidden_size": hidden, "ffn_hidden_size": 2 * hidden,
             "padded_vocab_size": -(-VOCABULARY // cards) * cards, "seq_length": POSITIONS}
    print(f"{path} on {cards} CPU processes: data_parallel {plan['data_parallel']} x model_parallel "
          f"{plan['model_parallel']}, optimizer sharding {settings['parallel'].get('enable_parallel_optimizer', False)}, "
          f"{model['num_attention_heads']} heads, {model['multi_query_group_num']} groups as they are\nshrunk: "
          + ", ".join(f"{name} {model[name]} -> {value}" for name, value in small.items()))
    chunk = settings["dpo"].get("logps_chunk_size") and POSITIONS * plan["data_parallel"]  # two chunks
    many = config.merge(settings, {
        "context": {"device_target": "CPU"},
        "model": {"model_config": {**small, "use_flash_attention": False, "compute_dtype": "float32",
                                   "param_init_type": "float32"}},
        "dpo": {"logps_chunk_size": chunk, "check_reference": True, "reference_tolerance": 1e-3},
        "runner_config": {"sink_mode": False, "max_steps": 3, "epochs": 3},
        "lr_schedule": {"learning_rate": 1e-3, "warmup_ratio": 0.0}})
    single = {"parallel": {"parallel_mode": 0, "enable_parallel_optimizer": False, "full_batch": False},
              "parallel_config": {"data_parallel": 1, "model_parallel": 1}}
    rows = settings["runner_config"]["batch_size"] * plan["data_parallel"]
    one = config.merge(many, {**single, "runner_config": {"batch_size": rows}})
    base = {key: value for key, value in one.items() if key != "lora"}
    process = config.merge(base, {"run_mode": "preprocess"})
    predict = config.merge(base, {"run_mode": "predict", "model": {
        "arch": {"type": "ChatGLM2ForConditionalGeneration"},
        "model_config": {"batch_size": 1, "use_past": False, "max_decode_length": 16, "do_sample": False}}})
    for name, content in {"many": many, "one": one, "process": process, "predict": predict}.items():
        (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def steps(run):
    """Training steps of a run: list of dicts."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "train"]


def differences(one, many):
    """Largest relative difference of each metric over the steps, dict; rewards are relative to their largest."""
    result = {}
    for name in ("loss", "chosen_reward", "rejected_reward", "grad_norm"):
        left, right = (np.array([step[name] for step in run]) for run in (one, many))
        scale = np.abs(left) if name in ("loss", "grad_norm") else np.abs(left).max()
        result[name] = float((np.abs(left - right) / scale).max()) if len(left) == len(right) else np.inf
    return result


def weight_difference(one, many, before):
    """(name, value) of the weight that differs most: norm of the difference over norm of what training changed."""
    one, many, before = (checkpoint.read(path) for path in (one, many, before))
    if problem := checkpoint.difference({name: tensor.shape for name, tensor in one.items()},
                                        {name: tensor.shape for name, tensor in many.items()}):
        return problem, np.inf

    def relative(name):
        start, left, right = (stored[name].float32() for stored in (before, one, many))
        return float(np.linalg.norm(right - left) / max(np.linalg.norm(left - start), 1e-12))
    return max(((name, relative(name)) for name in one), key=lambda pair: pair[1])


def compare(folder, cards):
    """Say how the run on many cards agrees with that in one process; status 1 where it does not."""
    folder = Path(folder)
    one, many = steps(folder / "one"), steps(folder / "many")
    found = differences(one, many)
    name, weights = weight_difference(*(folder / run / "merged/merged.ckpt" for run in ("one", "many")), folder / "tiny.ckpt")
    answers = [(folder / f"answer_{run}.txt").read_text() for run in ("one", "many")]
    print(f"{'over 3 steps':<18}{'one process':>16}{f'{cards} cards':>16}   largest relative difference")
    wrong = []
    for metric, value in found.items():
        bad = not value <= TOLERANCE
        print(f"  {metric:<16}{one[-1][metric]:>16.6f}{many[-1][metric]:>16.6f}   {value:.1e}{'  WRONG' if bad else ''}")
        wrong += [f"{metric} differs by {value:.1e} (allowed: {TOLERANCE:.0e})"] if bad else []
    print(f"  merged weights: largest difference {weights:.1e} of what training changed, in {name}")
    wrong += [] if weights <= 100 * TOLERANCE else [f"merged weights differ by {weights:.1e} of their change, in {name}"]
    wrong += [] if answers[0] == answers[1] else ["the merged models answer differently"]
    if wrong:
        print("the plan does NOT compute what one process computes: " + "; ".join(wrong))
        sys.exit(1)
    print(f"the plan is legal, and {cards} cards compute what one process computes")


def explain(output, log):
    """Why a command failed: the line with the error in its output or in a worker's log."""
    texts = [Path(output).read_text(errors="replace")]
    texts += [path.read_text(errors="replace") for path in sorted(Path(log).glob("worker_*.log"))]
    for text in texts:
        for pattern in (r"^error: (.*)", r"^\w*Error: (.+)", r"^\w*Error:\s+(?:-+\n- .*\n-+\n)?(.*)"):
            if match := re.search(pattern, text, re.MULTILINE):
                print(f"{Path(output).stem} failed: {match[1].strip()}\n  all of it: {output}, {log}/", file=sys.stderr)
                return
    print(f"{Path(output).stem} failed without a reason that is known here; see {output} and {log}/", file=sys.stderr)


def main():
    command, *arguments = sys.argv[1:]
    if command == "shrink":
        shrink(arguments[0], int(arguments[1]), arguments[2])
    elif command == "compare":
        compare(*arguments)
    else:
        explain(*arguments)


if __name__ == "__main__":
    cli.run(main)
