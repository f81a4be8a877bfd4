"""What rehearse.sh cannot say in bash: shrink a training YAML, compare two runs, and explain what failed."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import yaml

from mindrlhf import cli, config
from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import containers, strict
from mindrlhf.parallel import Plan

# of losses, gradient norms (relative) and rewards (relative to the largest). float32 gives 1e-5. An NPU's bfloat16 moves
# an answer's log-prob by up to 2 nats (mindrlhf/check.py), its reward by beta times that; that was not tried on an NPU
TOLERANCE = {"CPU": {"loss": 1e-4, "grad_norm": 1e-4, "chosen_reward": 1e-4, "rejected_reward": 1e-4, "weights": 1e-2},
             "Ascend": {"loss": 0.1, "grad_norm": 0.2, "chosen_reward": 0.5, "rejected_reward": 0.5, "weights": 1.0}}
STEPS = 6
# what is other than in the user's YAMLs, and why: sizes, so that it fits a CPU and ends in minutes
SIZES = {"model.model_config.num_layers": 2, "model.model_config.hidden_size": 128, "model.model_config.ffn_hidden_size": 256,
         "model.model_config.seq_length": 128}
HEAD = "model.model_config.kv_channels"
HEADS = {"CPU": 16, "Ascend": 64}  # the least that flash attention takes: its stand-in, and MindFormers' page for NPUs
VOCABULARY = 528  # padded_vocab_size, at least
# types: a CPU has no bfloat16 kernels
TYPES = {"context.device_target": "CPU", "model.model_config.compute_dtype": "float32",
         "model.model_config.param_init_type": "float32", "dpo.reference_tolerance": 1e-3}
# lengths of the run, and a learning rate at which a random model changes enough to be compared
RUN = {"runner_config.max_steps": STEPS, "runner_config.epochs": STEPS, "lr_schedule.learning_rate": 1e-3}
# one process computes with cells of its own: no plan, no flash attention, no sink mode
ALONE = {"parallel.parallel_mode": 0, "parallel.enable_parallel_optimizer": False, "parallel.full_batch": False,
         "parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1, "runner_config.sink_mode": False,
         "model.model_config.use_flash_attention": False, "context.jit_config": {}}


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


def shrunk(settings, vocabulary, device):
    """Settings of a YAML with small sizes, on a CPU without bfloat16; all else as it is."""
    return config.with_changes(settings, {**SIZES, HEAD: HEADS[device],
                                     **(TYPES if device == "CPU" else {"context.max_device_memory": "4GB"}),
                                     "model.model_config.padded_vocab_size": vocabulary})


def shrink(path, process, predict, cards, folder, device):
    """Write the YAMLs of the rehearsal: many (the plan), one (the same in one process), process, predict, plain (predict
    without a cache).

    Raises:
        UserError: the YAML is not one of a semi-auto parallel training.
    """
    settings = config.load_settings(path, run_mode="finetune")
    if not Plan.of(settings).is_sharded:
        raise cli.UserError(f"{path}: has parallel.parallel_mode 0, so there is no plan to rehearse; a plan has 1")
    if problems := illegal(settings, cards):
        print(f"the plan is illegal: {'; '.join(problems)}")
        sys.exit(1)
    model, plan = settings["model"]["model_config"], settings["parallel_config"]
    vocabulary = ceil_div(VOCABULARY, cards) * cards
    chunk = settings["dpo"].get("logps_chunk_size") and SIZES["model.model_config.seq_length"] * plan["data_parallel"]
    callbacks = [{**entry, "save_checkpoint_steps": 2} if "save_checkpoint_steps" in entry else entry
                 for entry in settings["callbacks"]]
    many = config.with_changes(shrunk(settings, vocabulary, device), {**RUN, "dpo.logps_chunk_size": chunk, "callbacks": callbacks})
    rows = settings["runner_config"]["batch_size"] * plan["data_parallel"]
    heads = {f"model.model_config.{name}": model[name] for name in ("num_attention_heads", "multi_query_group_num",
                                                                    "layernorm_epsilon", "rope_ratio")}
    process = config.with_changes(shrunk(config.load_settings(process, run_mode="preprocess"), vocabulary, device), heads)
    predict = config.with_changes(shrunk(config.load_settings(predict, run_mode="predict"), vocabulary, device),
                             {**heads, "model.model_config.max_decode_length": 16})
    plain = config.with_changes(predict, {"model.model_config.use_past": False, "model.model_config.is_dynamic": False,
                                     "model.model_config.use_flash_attention": False, "context.jit_config": {}})
    made = {"many": many, "one": config.with_changes(many, {**ALONE, "runner_config.batch_size": rows}), "process": process,
            "predict": predict, "plain": plain}
    for name, content in made.items():
        (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    describe(path, settings, many, cards, device)


def describe(path, settings, many, cards, device):
    """Say what is rehearsed, and what is other than in the YAML."""
    model, plan, runner = settings["model"]["model_config"], settings["parallel_config"], settings["runner_config"]
    where = "CPU processes" if device == "CPU" else device
    print(f"{path} on {cards} {where}: data_parallel {plan['data_parallel']} x model_parallel {plan['model_parallel']}, "
          f"optimizer sharding {settings['parallel'].get('enable_parallel_optimizer', False)}, "
          f"{model['num_attention_heads']} heads, {model['multi_query_group_num']} groups, flash attention "
          f"{model.get('use_flash_attention', False)}, sink mode {runner.get('sink_mode', False)}, LoRA {'lora' in settings}"
          "\nother than in the YAML: " + ", ".join(
              f"{key.split('.')[-1]} {config.get_setting(settings, key, 'unset')} -> {config.get_setting(many, key)}"
              for key in (*SIZES, HEAD, "model.model_config.padded_vocab_size", *TYPES, *RUN, "dpo.logps_chunk_size")))


def steps(run):
    """Training steps of a run: list of dicts."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "train"]


def differences(one, many):
    """Largest relative difference of each metric over the steps, dict; rewards are relative to the largest of both."""
    def over_steps(run, name):
        return np.array([step[name] for step in run])

    rewards, result = ("chosen_reward", "rejected_reward"), {}
    largest = max(np.abs(over_steps(one, name)).max() for name in rewards)
    for name in ("loss", *rewards, "grad_norm"):
        left, right = over_steps(one, name), over_steps(many, name)
        scale = largest if name in rewards else np.abs(left)
        result[name] = float((np.abs(left - right) / scale).max()) if len(left) == len(right) else np.inf
    return result


def weight_difference(one, many, before):
    """(name, value) of the weight that differs most: norm of the difference over norm of what training changed."""
    one, many, before = (containers.open_tensors(path) for path in (one, many, before))
    if problem := strict.describe_difference({name: tensor.shape for name, tensor in one.items()},
                                        {name: tensor.shape for name, tensor in many.items()}):
        return problem, np.inf

    def relative(name):
        start, left, right = (stored[name].float32() for stored in (before, one, many))
        return float(np.linalg.norm(right - left) / max(np.linalg.norm(left - start), 1e-12))
    return max(((name, relative(name)) for name in one), key=lambda pair: pair[1])


def compare(folder, cards, device):
    """Say how the run on many cards agrees with that in one process; status 1 where it does not."""
    folder, allowed = Path(folder), TOLERANCE[device]
    one, many = steps(folder / "one"), steps(folder / "many")
    if len(one) != STEPS or len(many) != STEPS:
        print(f"one process made {len(one)} steps, {cards} cards {len(many)}, where {STEPS} were expected: see {folder}")
        sys.exit(1)
    found = differences(one, many)
    name, weights = weight_difference(*(folder / run / "merged/merged.ckpt" for run in ("one", "many")), folder / "tiny.ckpt")
    answers = {path.name.removeprefix("answer_"): path.read_text() for path in sorted(folder.glob("answer_*"))}
    different = [name for name, text in answers.items() if text != answers[name.split("_")[0]]]
    print(f"{f'over {STEPS} steps':<18}{'one process':>16}{f'{cards} cards':>16}   largest relative difference")
    wrong = []
    for metric, value in found.items():
        bad = not value <= allowed[metric]
        print(f"  {metric:<16}{one[-1][metric]:>16.6f}{many[-1][metric]:>16.6f}   {value:.1e}{'  WRONG' if bad else ''}")
        wrong += [f"{metric} differs by {value:.1e} (allowed: {allowed[metric]:.0e})"] if bad else []
    print(f"  merged weights: largest difference {weights:.1e} of what training changed, in {name}")
    wrong += [] if weights <= allowed["weights"] else [f"merged weights differ by {weights:.1e} of their change, in {name}"]
    print(f"  answers before and after training, with the YAML's predict and without a cache: "
          f"{'  '.join(different) + '  WRONG' if different else 'the same'}")
    wrong += [f"the answer {name} is another one: see {folder}/answer_*" for name in different]
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
        shrink(*arguments[:3], int(arguments[3]), *arguments[4:])
    elif command == "compare":
        compare(*arguments)
    else:
        explain(*arguments)


if __name__ == "__main__":
    cli.run_command(main)
