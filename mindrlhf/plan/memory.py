"""Memory of a card during a step, part by part, in bytes.

Weights, gradients and moments are exact (parameters.py). What is kept from the forward to the backward
pass follows the graphs that MindSpore 2.7 compiles for these plans, and a layer's work follows runs on
the CPU; tests/test_plan.py and benchmarks/plan_memory.py compare both. Assumptions are marked.
"""
import math
from dataclasses import dataclass

from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan.parameters import BYTES, held

RESIDUAL = 4  # bytes: the sums between layers and the norms are float32 (layernorm_compute_type)
BUFFERS = 2e9  # assumption: the communication library's buffers and what fragmentation loses
# float32 tensors of a chunk's logits at once, measured by benchmarks/plan_memory.py: logits, shifted, exp,
# one-hot, products and gradients where cards share the vocabulary; logits and softmax where one has it all
SPREAD_COPIES, LOCAL_COPIES = 10, 3
MOST_CHUNKS = 64  # as in losses.py, which needs MindSpore


@dataclass(frozen=True)
class Shares:
    """How the positions of a step are shared out.

    Attributes:
        split: positions of a card where the model names no strategy (sums, norms, rotary embedding): MindSpore
            spreads the rows over all cards, as far as they divide.
        group: positions of a data-parallel group: those of a card's matrix products.
        everywhere: positions whose log-probs each card computes, on its part of the vocabulary.
        vocabulary: over how many cards the vocabulary is split.
    """
    split: int
    group: int
    everywhere: int
    vocabulary: int


def shares_of(settings, devices):
    """Shares of the settings of a YAML on a number of cards."""
    plan, length = Plan.of(settings, devices), settings["model"]["model_config"]["seq_length"]
    batch = settings["runner_config"]["batch_size"]
    if not Plan.of(settings).is_sharded:  # each card by itself
        return Shares(2 * batch * length, 2 * batch * length, 2 * batch * length, 1)
    rows, group = 2 * batch * plan.data, 2 * batch * length
    split = rows // math.gcd(rows, plan.cards) * length
    return Shares(split, group, group, 1) if plan.keeps_vocabulary else Shares(
        split, group, rows * length, plan.cards)


def widths(settings):
    """Numbers of a position: (hidden, all query heads, all key heads, feed-forward)."""
    numbers = ModelConfig.of(settings)
    query, key, _ = numbers.qkv_sizes
    return numbers.hidden_size, query, key, numbers.ffn_hidden_size


def layer_kept(settings, shares):
    """Bytes that a layer keeps for the backward pass under recomputation: the sum that enters it, and
    queries, keys and values before rotation, where MindSpore's recomputation starts. A sharded graph in
    mixed precision keeps float32 copies as well: of the attention's output, and of those parts of queries
    and keys that are rotated."""
    model, (hidden, query, key, _) = settings["model"]["model_config"], widths(settings)
    compute = BYTES[model["compute_dtype"]]
    kept = RESIDUAL * hidden + compute * (query + 2 * key)
    if compute != RESIDUAL and Plan.of(settings).is_sharded:
        kept += RESIDUAL * hidden + RESIDUAL * (query + key) // 2
    return shares.split * kept


def head_kept(settings, shares, model_parallel):
    """Bytes that stay besides: the hidden states of all positions whose log-probs are computed here, the
    last norm's input, the embedding (of a whole group, if its vocabulary is split), and the output
    layer's weight in another type."""
    model = settings["model"]["model_config"]
    hidden, compute = model["hidden_size"], BYTES[model["compute_dtype"]]
    embedded = shares.group if model_parallel > 1 else shares.split
    weight = model["padded_vocab_size"] // shares.vocabulary * hidden * compute
    return (shares.everywhere * hidden * compute + (shares.split + embedded) * hidden * RESIDUAL
            + (weight if model["param_init_type"] != model["compute_dtype"] else 0))


def layer_whole(settings, positions):
    """Bytes that a layer keeps without recomputation: inputs of norms and matrix products, queries, keys,
    values, the attention's result, gate, its SiLU, up, their product. Flash attention keeps no scores."""
    hidden, query, _, ffn = widths(settings)
    compute = BYTES[settings["model"]["model_config"]["compute_dtype"]]
    return positions * compute * (4 * ffn + 6 * hidden + 4 * query)


def layer_work(settings, positions):
    """Bytes of the gradients in a layer where most are alive: of the product, the SiLU, gate and up, and
    of the last two joined, and four of hidden size."""
    hidden, _, _, ffn = widths(settings)
    return positions * BYTES[settings["model"]["model_config"]["compute_dtype"]] * (6 * ffn + 4 * hidden)


def chunks(settings, shares):
    """(positions whose logits exist at once, into how many chunks all positions fall)."""
    size = settings["dpo"]["logps_chunk_size"] or shares.everywhere
    if Plan.of(settings).is_sharded:
        size = max(size, math.ceil(shares.everywhere / MOST_CHUNKS))
    return min(size, shares.everywhere), math.ceil(shares.everywhere / size)


def chunk_gradients(settings, shares):
    """Bytes of the gradients of the hidden states of all positions and of the output layer's weight on this
    card. Chunk after chunk, a sharded graph adds a chunk's to the sum so far: three of each at once, the
    weight's in float32, and a chunk's in the computation's type before."""
    model = settings["model"]["model_config"]
    compute, (_, count) = BYTES[model["compute_dtype"]], chunks(settings, shares)
    one = shares.everywhere * model["hidden_size"] * compute
    if not Plan.of(settings).is_sharded or count == 1:  # blocks of the vocabulary: one of each
        return one
    weight = 0 if "lora" in settings else model["padded_vocab_size"] // shares.vocabulary * model["hidden_size"]
    stored = BYTES[model["param_init_type"]]
    return 3 * one + weight * (3 * stored + (compute if compute != stored else 0))


def compute_copies(settings, devices):
    """Bytes of the matrices in the type of the computation, gathered where the optimizer shares them out.
    They are kept from the forward to the backward pass: MindFormers passes
    parallel_optimizer_comm_recompute to no layer."""
    model = settings["model"]["model_config"]
    return sum(math.prod(part.gathered) * BYTES[model["compute_dtype"]]
               for name, part in held(settings, devices).items()
               if "encoder.layers" in name and len(part.shape) == 2
               and (part.shared_by > 1 or part.dtype != model["compute_dtype"]))


def memory_parts(settings, devices):
    """Memory of a card.

    Args:
        settings: as config.load() returns them, of run_mode finetune or preprocess.
        devices: number of cards.

    Returns:
        dict, name of a part -> bytes. They are not all there at once: peak() says when.
    """
    shares, table = shares_of(settings, devices), held(settings, devices)
    model, training = settings["model"]["model_config"], settings["run_mode"] == "finetune"
    trained = [part for part in table.values() if part.trained and training]
    recompute = settings.get("recompute_config", {}).get("recompute", False)
    kept = layer_kept(settings, shares) if recompute else layer_whole(settings, shares.group)
    work = layer_whole(settings, shares.group) if recompute or not training else 0
    semi, cast = Plan.of(settings).is_sharded, model["param_init_type"] != model["compute_dtype"]
    cell = 1 if model.get("use_flash_attention") else 4  # bytes of the mask's numbers
    logits = chunks(settings, shares)[0] * model["padded_vocab_size"] // shares.vocabulary * 4
    return {
        "weights": sum(part.bytes for part in table.values()),
        "Adam's moments": sum(2 * 4 * math.prod(part.slice) for part in trained),
        "gradients": sum(part.bytes for part in trained),
        "weights in compute type": compute_copies(settings, devices) if training or cast else 0,
        "kept by the layers": model["num_layers"] * kept * training,
        "embedding and last norm": head_kept(settings, shares, Plan.of(settings, devices).model),
        "mask": shares.group * model["seq_length"] * cell,
        "one layer at work": work + layer_work(settings, shares.group) * training,
        "logits of a chunk": logits * (SPREAD_COPIES if semi and training else LOCAL_COPIES),
        "gradients of chunks": chunk_gradients(settings, shares) * training,
        "buffers": BUFFERS}


def peak_memory_of(settings, devices):
    """The most that a card holds at once.

    A step's memory has three summits: at the log-probs, when all layers wait for their gradient; in the
    last layer, which goes backward first; in the first one, when the gradients of all weights are there.
    Of accumulated parts the sum of the gradients is there always.

    Returns:
        (where: "log-probs", "last layer" or "first layer", bytes).
    """
    found = memory_parts(settings, devices)
    kept, gradients, work = found["kept by the layers"], found["gradients"], found["one layer at work"]
    always = sum(found[name] for name in (
        "weights", "Adam's moments", "weights in compute type", "embedding and last norm", "mask",
        "buffers"))
    if settings["runner_config"].get("gradient_accumulation_steps", 1) > 1:
        always += gradients
    summits = {"log-probs": kept + found["logits of a chunk"] + found["gradients of chunks"],
               "last layer": kept + work, "first layer": gradients + work}
    where = max(summits, key=summits.get)
    return where, always + summits[where]
