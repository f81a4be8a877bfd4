"""Time of training and preprocessing, by arithmetic: floating-point operations over what the cards can do."""
import math

from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan import traffic
from mindrlhf.plan.memory import shares_of, widths

# operations a second of an Ascend 910B in bfloat16, as commonly stated: its larger variant; the smaller 313e12
PEAK = 376e12
EFFICIENCY = 0.45  # assumption: share of the peak, counting operations that recomputation repeats
BANDWIDTH = 100e9  # assumption: bytes a second that a card receives over HCCS, about half of its 196e9


def forward_operations(settings):
    """Operations of one position in the forward pass: two for each number of every matrix product, and
    attention over all positions of the row (flash attention computes what the mask hides, too).

    Returns:
        (of the layers, of the output layer).
    """
    numbers, (hidden, query, key, ffn) = ModelConfig.of(settings), widths(settings)
    matrices = hidden * (query + 2 * key) + query * hidden + 3 * hidden * ffn
    attention = 4 * settings["model"]["model_config"]["seq_length"] * query
    return numbers.num_layers * (2 * matrices + attention), 2 * hidden * numbers.padded_vocab_size


def step_operations(settings, recomputed=None):
    """Operations of one position in a training step: forward, twice that backward, once more what is
    computed again.

    Args:
        settings: as config.load() returns them.
        recomputed: share of the layers that are computed again; None: as the YAML says.
    """
    layers, output = forward_operations(settings)
    if recomputed is None:
        recomputed = float(settings.get("recompute_config", {}).get("recompute", False))
    backward = 1 if "lora" in settings else 2  # frozen matrices need no gradient of their own
    again = 1 if settings["dpo"]["logps_chunk_size"] else 0
    return layers * (1 + backward + recomputed) + output * (1 + backward + again)


def tokens_per_second(operations, *, peak=PEAK, efficiency=EFFICIENCY):
    """Positions a second of one card, from the operations of one."""
    return peak * efficiency / operations


def seconds_per_step(settings, devices):
    """(seconds of computing, of communication) of a step; parts of an accumulated batch count one by one."""
    plan, shares = Plan.of(settings, devices), shares_of(settings, devices)
    positions = shares.group / plan.model  # model parallelism splits their matrix products
    if settings["run_mode"] == "preprocess":
        return positions / tokens_per_second(sum(forward_operations(settings))), 0.0
    return (positions / tokens_per_second(step_operations(settings)),
            sum(traffic.traffic_volumes(settings, devices).values()) / BANDWIDTH)


def steps_per_epoch(settings, devices, rows):
    """Steps of a pass over so many rows (a chosen and a rejected side each), accumulated parts counted."""
    return math.ceil(rows / (settings["runner_config"]["batch_size"] * Plan.of(settings, devices).data))


def run_hours(settings, devices, rows):
    """(fastest, slowest) hours of a run over so many rows: communication behind computing, or after it."""
    computing, communicating = seconds_per_step(settings, devices)
    count = steps_per_epoch(settings, devices, rows) * settings["runner_config"].get("epochs", 1) / 3600
    return count * max(computing, communicating), count * (computing + communicating)
