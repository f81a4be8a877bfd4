"""Memory of a card during a step, part by part, in bytes.

Weights, gradients and moments are exact (parameters.py). Activations that are kept from the forward
to the backward pass follow the graphs that MindSpore 2.7 compiles for these plans. The working
memory of a layer follows runs on the CPU. tests/test_plan.py and benchmarks/plan_memory.py compare
both. Assumptions are marked.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from mindrlhf.arithmetic import ceil_div
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import MOST_CHUNKS, Plan
from mindrlhf.plan.parameters import BYTES, held
from mindrlhf.recompute import recomputed_layers

RESIDUAL = 4  # bytes: residuals and norms are float32 (layernorm_compute_type)
BUFFERS = 2e9  # assumption: the communication library's buffers, and memory lost to fragmentation
# float32 tensors of a chunk's logits alive at once, measured by benchmarks/plan_memory.py: logits,
# shifted, exp, one-hot, products, gradients if the vocabulary is sharded, else logits and softmax
SPREAD_COPIES, LOCAL_COPIES = 10, 3


@dataclass(frozen=True)
class Shares:
    """How the positions of a step are split over the cards.

    Attributes:
        split: positions of a card in operators for which the model names no strategy (sums, norms,
            rotary embedding): MindSpore splits the rows over all cards, as far as they divide.
        group: positions of a data-parallel group, which its cards' matrix products compute.
        everywhere: positions whose log-probs each card computes, on its part of the vocabulary.
        vocabulary: number of cards over which the vocabulary is split.
    """
    split: int
    group: int
    everywhere: int
    vocabulary: int


class Widths(NamedTuple):
    """Elements of a position in the tensors of a layer.

    Attributes:
        hidden: hidden state.
        query: all query heads.
        key: all key heads; the value heads have as many.
        ffn: feed-forward layer.
    """
    hidden: int
    query: int
    key: int
    ffn: int


class Chunks(NamedTuple):
    """How the log-probs of a step are split into chunks.

    Attributes:
        size: positions of a chunk, whose logits are in memory at once.
        number: how many chunks there are.
    """
    size: int
    number: int


class Peak(NamedTuple):
    """The moment of a step with the most memory.

    Attributes:
        where: "log-probs", "last layer", "last recomputed layer" or "first layer".
        bytes: memory of a card.
    """
    where: str
    bytes: float


def shares_of(settings: dict[str, Any], devices: int) -> Shares:
    """Shares of a YAML on a number of cards."""
    plan, length = Plan.of(settings, devices), settings["model"]["model_config"]["seq_length"]
    batch = settings["runner_config"]["batch_size"]
    group = batch * length
    if not plan.is_sharded:  # each card computes alone
        return Shares(group, group, group, 1)
    rows = batch * plan.data
    split = rows // math.gcd(rows, plan.cards) * length
    if plan.keeps_vocabulary:
        return Shares(split, group, group, 1)
    return Shares(split, group, rows * length, plan.cards)


def widths(settings: dict[str, Any]) -> Widths:
    """Widths of the model's layers."""
    sizes = ModelConfig.of(settings)
    query, key, _ = sizes.qkv_sizes
    return Widths(sizes.hidden_size, query, key, sizes.ffn_hidden_size)


def compute_bytes(settings: dict[str, Any]) -> int:
    """Bytes of an element in compute_dtype."""
    return BYTES[settings["model"]["model_config"]["compute_dtype"]]


def layer_kept(settings: dict[str, Any], shares: Shares) -> int:
    """Bytes that a layer keeps for the backward pass under recomputation.

    These are the residual that enters the layer, and queries, keys and values before rotation,
    where MindSpore's recomputation starts. A sharded graph in mixed precision also keeps float32
    copies of the attention's output, and of the rotated parts of queries and keys.
    """
    width, compute = widths(settings), compute_bytes(settings)
    kept = RESIDUAL * width.hidden + compute * (width.query + 2 * width.key)
    if compute != RESIDUAL and Plan.of(settings).is_sharded:
        kept += RESIDUAL * width.hidden + RESIDUAL * (width.query + width.key) // 2
    return shares.split * kept


def head_kept(settings: dict[str, Any], shares: Shares, model_parallel: int) -> int:
    """Bytes that are kept outside of the layers.

    These are the hidden states of all positions whose log-probs are computed here, the input of the
    last norm, the embedding (of the whole group if its vocabulary is split), and the output layer's
    weight in compute_dtype.

    Args:
        settings: as config.load_settings returns them.
        shares: of the settings.
        model_parallel: number of cards in a group.
    """
    model, sizes = settings["model"]["model_config"], ModelConfig.of(settings)
    hidden, compute = sizes.hidden_size, compute_bytes(settings)
    embedded = shares.group if model_parallel > 1 else shares.split
    weight = sizes.padded_vocab_size // shares.vocabulary * hidden * compute
    return (shares.everywhere * hidden * compute + (shares.split + embedded) * hidden * RESIDUAL
            + (weight if model["param_init_type"] != model["compute_dtype"] else 0))


def layer_whole(settings: dict[str, Any], positions: int) -> int:
    """Bytes that a layer keeps without recomputation.

    These are the inputs of norms and matrix products, queries, keys, values, the attention's
    result, gate, its SiLU, up, and their product. Flash attention keeps no scores.
    """
    width = widths(settings)
    elements = 4 * width.ffn + 6 * width.hidden + 4 * width.query
    return positions * compute_bytes(settings) * elements


def layer_work(settings: dict[str, Any], positions: int) -> int:
    """Bytes of the gradients within a layer, at the moment when most are alive.

    These are the gradients of the product, the SiLU, gate and up, of gate and up joined, and four
    of hidden size.
    """
    width = widths(settings)
    return positions * compute_bytes(settings) * (6 * width.ffn + 4 * width.hidden)


def chunks(settings: dict[str, Any], shares: Shares) -> Chunks:
    """The chunks in which a step's log-probs are computed."""
    size = settings["dpo"]["logps_chunk_size"] or shares.everywhere
    if Plan.of(settings).is_sharded:
        size = max(size, ceil_div(shares.everywhere, MOST_CHUNKS))
    return Chunks(min(size, shares.everywhere), ceil_div(shares.everywhere, size))


def chunk_gradients(settings: dict[str, Any], shares: Shares) -> int:
    """Bytes of the gradients of all hidden states, and of the output layer's weight on this card.

    A sharded graph adds the gradients chunk by chunk to the sum so far: three of each are alive at
    once, the weight's in float32, and a chunk's in compute_dtype before that.
    """
    model, sizes = settings["model"]["model_config"], ModelConfig.of(settings)
    compute, stored = compute_bytes(settings), BYTES[model["param_init_type"]]
    one = shares.everywhere * sizes.hidden_size * compute
    if not Plan.of(settings).is_sharded or chunks(settings, shares).number == 1:
        return one  # computed in blocks of the vocabulary: one of each
    weight = sizes.padded_vocab_size // shares.vocabulary * sizes.hidden_size
    if "lora" in settings:  # the output layer is frozen
        weight = 0
    return 3 * one + weight * (3 * stored + (compute if compute != stored else 0))


def compute_copies(settings: dict[str, Any], devices: int) -> int:
    """Bytes of the matrices in compute_dtype, gathered if the optimizer shards them.

    They are kept from the forward to the backward pass: MindFormers passes
    parallel_optimizer_comm_recompute to no layer.
    """
    dtype = settings["model"]["model_config"]["compute_dtype"]
    return sum(math.prod(part.gathered) * BYTES[dtype]
               for name, part in held(settings, devices).items()
               if "encoder.layers" in name and len(part.shape) == 2
               and (part.shared_by > 1 or part.dtype != dtype))


def memory_parts(settings: dict[str, Any], devices: int) -> dict[str, float]:
    """Memory of a card, part by part.

    Args:
        settings: as config.load_settings returns them, of any run_mode but predict.
        devices: number of cards.

    Returns:
        name of a part -> bytes. They are not alive all at once, see peak_memory_of.
    """
    shares, table = shares_of(settings, devices), held(settings, devices)
    plan, sizes = Plan.of(settings, devices), ModelConfig.of(settings)
    model, training = settings["model"]["model_config"], settings["run_mode"] == "finetune"
    trained = [part for part in table.values() if part.trained and training]
    again, whole = recomputed_layers(settings), layer_whole(settings, shares.group)
    kept = again * layer_kept(settings, shares) + (sizes.num_layers - again) * whole
    work = whole if again or not training else 0
    casts = training or model["param_init_type"] != model["compute_dtype"]
    mask_bytes = 1 if model.get("use_flash_attention") else 4  # of an element
    logits = chunks(settings, shares).size * sizes.padded_vocab_size // shares.vocabulary * 4
    copies = SPREAD_COPIES if plan.is_sharded and training else LOCAL_COPIES
    return {
        "weights": sum(part.bytes for part in table.values()),
        "Adam's moments": sum(2 * 4 * math.prod(part.slice) for part in trained),
        "gradients": sum(part.bytes for part in trained),
        "weights in compute type": compute_copies(settings, devices) if casts else 0,
        "kept by the layers": kept * training,
        "embedding and last norm": head_kept(settings, shares, plan.model),
        "mask": shares.group * model["seq_length"] * mask_bytes,
        "one layer at work": work + layer_work(settings, shares.group) * training,
        "logits of a chunk": logits * copies,
        "gradients of chunks": chunk_gradients(settings, shares) * training,
        "buffers": BUFFERS}


def peak_memory_of(settings: dict[str, Any], devices: int) -> Peak:
    """The most memory that a card holds at once.

    A step has four candidates: the log-probs, when all layers wait for their gradient; the last
    layer, whose backward pass comes first; the last of the recomputed layers, which are the first
    ones of the network, when the others are done; and the first layer, when the gradients of all
    weights are alive. With gradient accumulation, the sum of the gradients is always alive.

    Args:
        settings: as config.load_settings returns them, of any run_mode but predict.
        devices: number of cards.
    """
    found, shares = memory_parts(settings, devices), shares_of(settings, devices)
    layers, again = ModelConfig.of(settings).num_layers, recomputed_layers(settings)
    gradient_work = layer_work(settings, shares.group)
    kept, gradients, work = (
        found[name] for name in ("kept by the layers", "gradients", "one layer at work"))
    always = sum(found[name] for name in (
        "weights", "Adam's moments", "weights in compute type", "embedding and last norm", "mask",
        "buffers"))
    if settings["runner_config"].get("gradient_accumulation_steps", 1) > 1:
        always += gradients
    peaks = [Peak("log-probs", kept + found["logits of a chunk"] + found["gradients of chunks"]),
             Peak("first layer", gradients + work)]
    if again in (0, layers) or settings["run_mode"] != "finetune":
        peaks.insert(1, Peak("last layer", kept + work))
    else:
        waiting = again * layer_kept(settings, shares)
        done = gradients * (layers - again) / layers
        peaks[1:1] = [Peak("last layer", kept + gradient_work),
                      Peak("last recomputed layer", waiting + done + work)]
    peak = max(peaks, key=lambda each: each.bytes)
    return Peak(peak.where, always + peak.bytes)
