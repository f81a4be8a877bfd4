"""Bytes that a card receives in a training step, by kind.

Counted as in the graphs that MindSpore 2.7 compiles (tests/test_plan.py has the record). A gather or
scatter over n cards moves (n - 1) / n of the whole, an all-reduce twice that.
"""
import math

from mindrlhf.parallel import Plan
from mindrlhf.plan.memory import RESIDUAL, shares_of, widths
from mindrlhf.plan.parameters import BYTES, held


def _of(cards):
    """Share that comes from other cards."""
    return 1 - 1 / cards


def layer(settings, devices):
    """(bytes that a layer gathers in the forward pass, of these what recomputation does not gather again).

    MindFormers names strategies for matrix products and heads only. Between them MindSpore spreads the
    rows over all cards, so every product's input is gathered and its output shared out again: the price
    of model parallelism here. Without flash attention the scores wander, too.
    """
    plan, shares = Plan.of(settings, devices), shares_of(settings, devices)
    model, (hidden, query, key, ffn) = settings["model"]["model_config"], widths(settings)
    compute = BYTES[model["compute_dtype"]]
    rows, columns = _of(shares.group // shares.split), _of(plan.model)  # shares of rows and columns fetched
    if plan.model == 1:
        return 0, 0
    flash = model.get("use_flash_attention", False)
    keys = 2 * key if flash else 2 * query
    joint = shares.group * (query + 2 * key) * columns * compute
    moved = rows * (2 * hidden + query + keys) + columns * (query + hidden + 2 * ffn)
    moved *= shares.group * compute
    if not flash:  # scores to rows in the computation's type, probabilities back to heads
        scores = shares.group * model["num_attention_heads"] * model["seq_length"]
        moved += scores * (columns + rows) * compute
    return joint + moved, joint


def traffic_volumes(settings, devices):
    """Traffic of a training step.

    Args:
        settings: as config.load() returns them, of run_mode finetune.
        devices: number of cards.

    Returns:
        dict, kind -> bytes that a card receives.
    """
    plan, shares = Plan.of(settings, devices), shares_of(settings, devices)
    table, model = held(settings, devices), settings["model"]["model_config"]
    compute, hidden, layers = BYTES[model["compute_dtype"]], model["hidden_size"], model["num_layers"]
    trained = [part for part in table.values() if part.trained]
    if not Plan.of(settings).is_sharded:
        return {"gradient all-reduce": 2 * _of(devices) * sum(part.bytes for part in trained)}
    gathered = sum(math.prod(part.gathered) * _of(part.shared_by)
                   * (compute if "encoder" in name else BYTES[part.dtype]) for name, part in table.items())
    scattered = sum(math.prod(part.gathered) * _of(part.shared_by) * BYTES[part.dtype] for part in trained)
    reduced = sum(2 * part.bytes * _of(plan.cards * math.prod(part.gathered) // math.prod(part.shape))
                  for part in trained if part.shared_by == 1)
    forward, once = layer(settings, devices)
    recompute = settings.get("recompute_config", {}).get("recompute", False)
    again = forward - once if recompute else 0
    products = 2 * _of(plan.model) * shares.group * hidden
    fetched = (shares.everywhere - shares.split) * hidden * compute
    return {"optimizer all-gather": gathered, "gradient reduce-scatter": scattered,
            "gradient all-reduce": reduced,
            "tensor-parallel gathers": layers * (2 * forward + again),
            "tensor-parallel all-reduces": 2 * products * (layers * compute + RESIDUAL * (plan.model > 1)),
            "hidden states for the logits": 2 * fetched}
