"""What a YAML costs, before anyone rents an NPU: python -m mindrlhf.plan CONFIG. Arithmetic, no MindSpore."""
import re

from mindrlhf import cli, config
from mindrlhf.parallel import Plan
from mindrlhf.plan import hours, memory, traffic
from mindrlhf.plan.parameters import parameter_bytes

EXAMPLE = "  python -m mindrlhf.plan finetune_glm4_9b.yaml --devices 8 --memory 64 --data dpo.mindrecord"
UNITS = {"GB": 1e9, "MB": 1e6}


def parser():
    """The command line."""
    arguments = cli.Parser("Memory of a card, traffic of a step and hours of a run, by arithmetic, for a "
                           "finetune or process YAML; and what to change first where they do not fit.",
                           EXAMPLE)
    arguments.add_argument("config", metavar="CONFIG", help="the YAML of a preprocessing or a training")
    arguments.add_argument("--devices", type=cli.positive, help="cards; as parallel_config says, or 8")
    arguments.add_argument("--memory", type=cli.positive, default=64, help="of a card, in GB (1e9 bytes); 64")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE", help=".mindrecord of the preprocessing, for the hours")
    source.add_argument("--rows", type=cli.positive, help="rows of the data, where there are none yet")
    return arguments


def room(settings, size):
    """Bytes of a card that may be used: its memory, and max_device_memory where the YAML sets less."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB)", config.get_setting(settings, "context.max_device_memory", ""))
    return min(size * 1e9, float(match[1]) * UNITS[match[2]] if match else size * 1e9)


def total_with(settings, devices, changes):
    """Bytes of a card if some settings were others: changes is a dict, dotted key -> value."""
    return memory.peak_memory_of(config.with_changes(settings, changes), devices)[1]


def remedies(settings, devices):
    """What could be changed, cheapest first: list of (sentence, changes)."""
    plan, model = Plan.of(settings, devices), settings["model"]["model_config"]
    semi, batch = Plan.of(settings).is_sharded, settings["runner_config"]["batch_size"]
    shares, length, found = memory.shares_of(settings, devices), model["seq_length"], []
    sizes = [size for size in (512, 1024, 2048, 4096, 8192, 16384) if size <= shares.everywhere]
    if sizes:
        size = min(sizes, key=lambda size: (total_with(settings, devices, {"dpo.logps_chunk_size": size}), -size))
        found.append((f"dpo.logps_chunk_size {size}", {"dpo.logps_chunk_size": size}))
    if settings["run_mode"] == "finetune":
        found.append(("recompute_config.recompute True", {"recompute_config.recompute": True}))
        if semi and plan.data > 1:
            found.append(("parallel.enable_parallel_optimizer True",
                          {"parallel.enable_parallel_optimizer": True}))
    if batch > 1:
        found.append((f"runner_config.batch_size {batch // 2}", {"runner_config.batch_size": batch // 2}))
    groups = model["multi_query_group_num" if model.get("use_flash_attention") else "num_attention_heads"]
    if semi and plan.data % 2 == 0 and groups % (2 * plan.model) == 0:
        found.append((f"parallel_config.data_parallel {plan.data // 2}, model_parallel {2 * plan.model}",
                      {"parallel_config.data_parallel": plan.data // 2,
                       "parallel_config.model_parallel": 2 * plan.model}))
    shorter = [length // 2 ** power for power in (1, 2, 3) if length // 2 ** power >= 512]
    found += [(f"seq_length {size}, and preprocess with --seq_len {size}",
               {"model.model_config.seq_length": size}) for size in shorter]
    return found


def advice(settings, devices, limit):
    """One line: it fits, or the first change that makes it fit (several at once where one is not enough)."""
    if memory.peak_memory_of(settings, devices)[1] <= limit:
        return "fits"
    sentences, together, least = [], {}, memory.peak_memory_of(settings, devices)[1]
    for sentence, changes in remedies(settings, devices):
        alone = total_with(settings, devices, changes)
        both = total_with(settings, devices, together | changes)
        if alone <= limit:
            return f"does not fit; change first: {sentence} ({alone / 1e9:.1f} GB)"
        if both < least:
            sentences, together, least = [*sentences, sentence], together | changes, both
        if least <= limit:
            return f"does not fit; change first: {'; '.join(sentences)} ({least / 1e9:.1f} GB)"
    return "does not fit, whatever is changed: take more cards, or train adapters (LoRA)"


def table(title, values, scale, unit):
    """Lines of a table of numbers, without those that would read 0."""
    width = max(map(len, values))
    shown = {name: value for name, value in values.items() if value >= scale / 200}
    return [title, *(f"  {name:<{width}}  {value / scale:>8.2f} {unit}" for name, value in shown.items())]


def report(settings, devices, *, limit, rows):
    """Lines of the whole report.

    Args:
        settings: as config.load() returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
        rows: of the data, or None.
    """
    plan, (where, most) = Plan.of(settings, devices), memory.peak_memory_of(settings, devices)
    shared = "the optimizer's state shared out" if plan.shards_optimizer else "the optimizer's state whole"
    lines = [f"{devices} cards: data_parallel {plan.data} x model_parallel {plan.model}, {shared}; "
             f"seq_length {settings['model']['model_config']['seq_length']}"]
    exact = parameter_bytes(settings, devices)
    lines += table(f"memory of a card ({len(exact)} weights and moments to the byte; the rest estimated)",
                   memory.memory_parts(settings, devices), 1e9, "GB")
    lines.append(f"  at most {most / 1e9:.1f} GB at once, in the {where}, of {limit / 1e9:.0f} GB: "
                 f"{advice(settings, devices, limit)}")
    if settings["run_mode"] == "finetune" and devices > 1:
        volumes = traffic.traffic_volumes(settings, devices)
        lines += table("traffic of a step: bytes that a card receives", volumes, 1e9, "GB")
    computing, communicating = hours.seconds_per_step(settings, devices)
    sent = f", {communicating:.1f} s communication at {hours.BANDWIDTH / 1e9:.0f} GB/s" * (communicating > 0)
    lines.append(f"a step: {computing:.1f} s computing at {hours.EFFICIENCY:.0%} of "
                 f"{hours.PEAK / 1e12:.0f} TFLOPS{sent} (assumed rates)")
    if rows:
        least, most = hours.run_hours(settings, devices, rows)
        span = f"{least:.1f}" if most - least < 0.05 else f"{least:.1f} to {most:.1f}"
        count = hours.steps_per_epoch(settings, devices, rows)
        lines.append(f"{rows} rows: {count} batches a card an epoch, {span} hours in all")
    return lines


def main(argv=None):
    """Print the report of a YAML."""
    arguments = parser().parse_args(argv)
    settings = config.load_settings(arguments.config, run_mode=("finetune", "preprocess"))
    plan = Plan.of(settings)
    devices = arguments.devices or (plan.cards if plan.is_sharded else 8)
    config.require_workers(settings, devices)
    rows = arguments.rows
    if arguments.data:
        from mindrlhf.data.mindrecord import read_data_sidecar
        sidecar = read_data_sidecar(arguments.data)
        rows, length = sidecar["rows"], settings["model"]["model_config"]["seq_length"]
        if sidecar["seq_len"] != length:
            raise cli.UserError(f"{arguments.data}: has rows of {sidecar['seq_len']}, the YAML seq_length "
                                f"{length}; give the YAML that trains on it")
    cli.say(*report(settings, devices, limit=room(settings, arguments.memory), rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
