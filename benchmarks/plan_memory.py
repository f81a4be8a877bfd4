"""How close is mindrlhf.plan's estimate of a layer's memory to what a training step needs?

    python benchmarks/plan_memory.py

Prints a table with one line per shape, measured and estimated MB and their ratio, then how many
miss the goal of 20 %; shapes that miss it are not left out.

Measured are MindFormers' own ChatGLM2 cells, forward and backward, float32 on the CPU, each shape
in a process of its own: the peak of resident memory during the step minus what the process held
before it. Estimated is the sum in plan.memory.peak_memory_of for the last and the first layer, plus
the attention scores, which flash attention would avoid: every layer keeps two such tensors, before
scaling and after softmax, and four gradients are alive at once, from softmax back to the product.

Operators run one by one (PyNative): MindSpore then frees a tensor after its last use, as a graph
does on an NPU. A graph on the CPU frees almost nothing before its end, and recomputes at once what
recomputation should defer, so it shows neither. Freed blocks that the allocator cannot reuse count
as measured. No CPU shows bfloat16, flash attention, or the NPU's allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from processes import ROOT, memory, reset_peak, table

BASE = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 64,
    "seq_length": 128,
    "rows": 32,
    "recompute": False,
}
SHAPES = [
    {},
    {"num_layers": 6},
    {"ffn_hidden_size": 2048},
    {"ffn_hidden_size": 2048, "num_layers": 6},
    {"hidden_size": 512},
    {"hidden_size": 512, "num_layers": 6},
    {"num_attention_heads": 8, "hidden_size": 512},
    {"rows": 96},
    {"num_layers": 3, "recompute": True},
    {"num_layers": 12, "recompute": True},
    {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 2048, "recompute": True},
    {"seq_length": 512, "rows": 8},
]
# log-probs with GLM-4's vocabulary: (cell, positions, chunk_size, copies of the logits in the plan)
LOGPS = [
    ("ShardedVocabularyLogps", 256, 0, "SPREAD_COPIES"),
    ("ShardedVocabularyLogps", 512, 0, "SPREAD_COPIES"),
    ("FullVocabularyLogps", 1024, 256, "LOCAL_COPIES"),
    ("FullVocabularyLogps", 2048, 256, "LOCAL_COPIES"),
]
VOCABULARY, NARROW = 151_552, 32
FIXED = {
    "padded_vocab_size": 256,
    "vocab_size": 256,
    "rmsnorm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "use_past": False,
    "multi_query_attention": True,
    "use_flash_attention": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "compute_dtype": "float32",
    "param_init_type": "float32",
    "layernorm_compute_type": "float32",
    "rotary_dtype": "float32",
    "eos_token_id": [1, 2],
}
Shape = dict[str, Any]


def measure_step(step: Callable[..., Any], small: Sequence[Any], inputs: Sequence[Any]) -> int:
    """Peak bytes of a step above what the process holds after a small one, which loads libraries.

    Args:
        step: returns (value, gradients).
        small: the step's inputs for one or two rows.
        inputs: its inputs.
    """
    float(step(*small)[0].asnumpy())
    reset_peak()
    before = memory("VmRSS")
    float(step(*inputs)[0].asnumpy())
    return memory("VmHWM") - before


def measure_logps(name: str, positions: int, chunk_size: int) -> int:
    """Bytes that log-probs and their gradients need. Arguments as in LOGPS."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    from mindrlhf import logps, runtime

    runtime.tensors_off_heap()
    ms.set_context(mode=1, device_target="CPU")
    output_layer = nn.Dense(NARROW, VOCABULARY, has_bias=False)
    options = {"vocab_shards": 1} if name == "ShardedVocabularyLogps" else {}
    cell = getattr(logps, name)(
        output_layer, VOCABULARY, chunk_size=chunk_size, trained=True, **options
    )

    def loss(hidden: ms.Tensor, labels: ms.Tensor) -> ms.Tensor:
        return cell(hidden, labels).sum()

    step = ops.value_and_grad(loss, 0, ms.ParameterTuple(output_layer.trainable_params()))
    hidden = ms.Tensor(np.random.default_rng(0).normal(size=(positions, NARROW)).astype("f4"))
    labels = ms.Tensor(np.zeros(positions, "i4"))
    return measure_step(step, (hidden[:2], labels[:2]), (hidden, labels))


def build_encoder(shape: Shape) -> Any:
    """MindFormers' ChatGLM2 without its output layer. shape: keys of ChatGLM2Config, recompute."""
    import mindspore as ms
    from mindspore import ops

    from mindrlhf import runtime
    from mindrlhf.cpu import operators

    runtime.quiet_mindformers()
    runtime.tensors_off_heap()
    ms.set_context(mode=1, device_target="CPU")
    operators.install()
    from mindformers import ChatGLM2Config
    from mindformers.models.glm2.glm2 import ChatGLM2Model
    from mindformers.modules.transformer import (
        TransformerOpParallelConfig,
        TransformerRecomputeConfig,
    )

    recompute = TransformerRecomputeConfig(recompute=shape.pop("recompute"))
    parallel = TransformerOpParallelConfig(recompute=recompute)
    network = ChatGLM2Model(ChatGLM2Config(parallel_config=parallel, **FIXED, **shape))
    if not hasattr(network.encoder, "cast"):  # see cpu/patches.py
        network.encoder.cast = ops.Cast()
    return network


def measure(shape: Shape) -> int:
    """Bytes that a training step of the encoder needs besides its weights."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    rows, length = shape.pop("rows"), shape["seq_length"]
    network = build_encoder(shape)

    class Loss(nn.Cell):
        """The sum of the hidden states."""

        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.network = network

        def construct(self, ids: ms.Tensor, mask: ms.Tensor) -> ms.Tensor:
            return self.network(ids, full_attention_mask=mask).sum()

    weights = ms.ParameterTuple(network.trainable_params())
    step = ops.value_and_grad(Loss().set_train(), None, weights)
    ids = ms.Tensor(np.ones((rows, length), "i4"))
    mask = ms.Tensor(np.triu(np.ones((rows, 1, length, length), "f4"), 1))
    # gradients of the small step are in the memory pool already
    gradients = sum(weight.size * 4 for weight in weights)
    return measure_step(step, (ids[:1], mask[:1]), (ids, mask)) + gradients


def estimate(shape: Shape) -> float:
    """The same by mindrlhf.plan."""
    from mindrlhf import config
    from mindrlhf.plan import memory, parameters

    model = {key: value for key, value in shape.items() if key not in ("rows", "recompute")}
    settings = config.load_settings(
        ROOT / "examples/glm4_dpo/finetune_glm4_tiny.yaml",
        run_mode="finetune",
        overrides={
            f"model.model_config.{key}": value
            for key, value in {**model, "padded_vocab_size": 256}.items()
        },
    )
    positions, layers = shape["rows"] * shape["seq_length"], shape["num_layers"]
    held = parameters.held(settings, 1)
    gradients = sum(part.bytes for name, part in held.items() if "output_layer" not in name)
    scores = positions * shape["num_attention_heads"] * shape["seq_length"] * 4
    kept = memory.layer_whole(settings, positions) + 2 * scores
    work = memory.layer_work(settings, positions) + 4 * scores
    if shape["recompute"]:
        return max(layers * positions * shape["hidden_size"] * 4, gradients) + kept + work
    return max(layers * kept, gradients) + work


def measure_apart(*arguments: object) -> float:
    """Bytes that measure or measure_logps finds in a new process."""
    command = [sys.executable, __file__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    from mindrlhf.plan import memory

    found = []  # (title, measured, estimated)
    for change in SHAPES:
        shape = {**BASE, **change}
        title = ", ".join(f"{key} {value}" for key, value in change.items()) or "base"
        found.append((title, measure_apart(shape), estimate(shape)))
    for name, positions, chunk_size, copies in LOGPS:
        title = f"{name}, {positions} positions, chunks of {chunk_size or 'all'}"
        logits = (chunk_size or positions) * VOCABULARY * 4
        estimated = logits * getattr(memory, copies)
        found.append((title, measure_apart(name, positions, chunk_size), estimated))
    print("base:", ", ".join(f"{key} {value}" for key, value in BASE.items()))
    table(
        "a training step of GLM-4's layers, then log-probs alone",
        ["shape", "measured, MB", "estimated", "ratio"],
        [
            [
                title,
                f"{measured / 1e6:.0f}",
                f"{estimated / 1e6:.0f}",
                f"{measured / estimated:.2f}",
            ]
            for title, measured, estimated in found
        ],
    )
    missed = sum(abs(measured / estimated - 1) > 0.2 for _, measured, estimated in found)
    print(f"{missed} of {len(found)} miss 20 %")


if __name__ == "__main__":
    if sys.argv[1:]:
        given = json.loads(sys.argv[1])
        print(measure(*given) if len(given) == 1 else measure_logps(*given))
    else:
        main()
