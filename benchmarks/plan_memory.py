"""How close is what mindrlhf.plan estimates for a layer to what a training step really needs?

MindFormers' own ChatGLM2 cells, forward and backward, float32 on the CPU, for several shapes; each in a
process of its own. Measured is the peak of resident memory during the step over what the process held
before it; estimated is what memory.peak adds up for the last and the first layer, and here, where no flash
attention avoids them, tensors of attention scores: two are kept in every layer, before scaling and after
softmax, and four gradients are at work, from softmax back to the product.

Operators run one by one (PyNative): there MindSpore frees a tensor after its last use, as a graph does on an
NPU. A graph on the CPU frees almost nothing before its end, and recomputes at once what recomputation should
defer, so it shows neither. The goal is 20 %; shapes that miss it are counted, not left out. Freed blocks that
the allocator cannot use again count as measured. What no CPU shows: bfloat16, flash attention, and the NPU's
allocator.

    python benchmarks/plan_memory.py
"""

import json
import subprocess
import sys

import data_model

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


# log-probs at GLM-4's vocabulary: (which cell, positions, chunk_size, copies that the plan counts)
LOGPS = [
    ("SpreadLogps", 256, 0, "SPREAD_COPIES"),
    ("SpreadLogps", 512, 0, "SPREAD_COPIES"),
    ("LocalLogps", 1024, 256, "LOCAL_COPIES"),
    ("LocalLogps", 2048, 256, "LOCAL_COPIES"),
]
VOCABULARY, NARROW = 151_552, 32


def status(key):
    """Bytes of an entry of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def peak_of(step, small, whole):
    """Bytes that a step takes above what the process holds after a small one, which loads libraries."""
    float(step(*small)[0].asnumpy())
    with open("/proc/self/clear_refs", "w") as file:  # lets the peak start anew
        file.write("5")
    before = status("VmRSS")
    float(step(*whole)[0].asnumpy())
    return status("VmHWM") - before


def measure_logps(name, positions, chunk_size):
    """Bytes that log-probs and their gradients need."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    from mindrlhf import losses, runtime

    runtime.tensors_off_heap()
    ms.set_context(mode=1, device_target="CPU")
    output_layer = nn.Dense(NARROW, VOCABULARY, has_bias=False)
    options = {"vocab_shards": 1} if name == "SpreadLogps" else {}
    cell = getattr(losses, name)(
        output_layer, VOCABULARY, chunk_size=chunk_size, trained=True, **options
    )

    def loss(hidden, labels):
        return cell(hidden, labels).sum()

    step = ops.value_and_grad(loss, 0, ms.ParameterTuple(output_layer.trainable_params()))
    hidden = ms.Tensor(np.random.default_rng(0).normal(size=(positions, NARROW)).astype("f4"))
    labels = ms.Tensor(np.zeros(positions, "i4"))
    return peak_of(step, (hidden[:2], labels[:2]), (hidden, labels))


def measure(shape):
    """Bytes that a training step of the encoder needs beside its weights."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    from mindrlhf import runtime

    runtime.quiet_mindformers()
    runtime.tensors_off_heap()
    ms.set_context(mode=1, device_target="CPU")
    runtime.before_build()
    from mindformers import ChatGLM2Config
    from mindformers.models.glm2.glm2 import ChatGLM2Model
    from mindformers.modules.transformer import (
        TransformerOpParallelConfig,
        TransformerRecomputeConfig,
    )

    rows, recompute = (
        shape.pop("rows"),
        TransformerRecomputeConfig(recompute=shape.pop("recompute")),
    )
    network = ChatGLM2Model(
        ChatGLM2Config(
            padded_vocab_size=256,
            vocab_size=256,
            rmsnorm=True,
            add_bias_linear=False,
            add_qkv_bias=True,
            use_past=False,
            multi_query_attention=True,
            use_flash_attention=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            compute_dtype="float32",
            param_init_type="float32",
            layernorm_compute_type="float32",
            rotary_dtype="float32",
            eos_token_id=[1, 2],
            parallel_config=TransformerOpParallelConfig(recompute=recompute),
            **shape,
        )
    )
    if not hasattr(network.encoder, "cast"):  # see cpu/patches.py
        network.encoder.cast = ops.Cast()

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.network = network

        def construct(self, ids, mask):
            return self.network(ids, full_attention_mask=mask).sum()

    weights = ms.ParameterTuple(network.trainable_params())
    step, length = ops.value_and_grad(Loss().set_train(), None, weights), shape["seq_length"]
    ids = ms.Tensor(np.ones((rows, length), "i4"))
    mask = ms.Tensor(np.triu(np.ones((rows, 1, length, length), "f4"), 1))
    gradients = sum(
        weight.size * 4 for weight in weights
    )  # the small step's are in the pool already
    return peak_of(step, (ids[:1], mask[:1]), (ids, mask)) + gradients


def estimate(shape):
    """The same by mindrlhf.plan."""
    from mindrlhf import config
    from mindrlhf.plan import memory, parameters

    model = {key: value for key, value in shape.items() if key not in ("rows", "recompute")}
    settings = config.load_settings(
        data_model.ROOT / "examples/glm4_dpo/finetune_glm4_tiny.yaml",
        run_mode="finetune",
        overrides={
            f"model.model_config.{key}": value
            for key, value in {**model, "padded_vocab_size": 256}.items()
        },
    )
    positions, layers = shape["rows"] * shape["seq_length"], shape["num_layers"]
    table = parameters.held(settings, 1)
    gradients = sum(part.bytes for name, part in table.items() if "output_layer" not in name)
    scores = positions * shape["num_attention_heads"] * shape["seq_length"] * 4
    whole = memory.layer_whole(settings, positions) + 2 * scores
    work = memory.layer_work(settings, positions) + 4 * scores
    if shape["recompute"]:
        return max(layers * positions * shape["hidden_size"] * 4, gradients) + whole + work
    return max(layers * whole, gradients) + work


def child(*arguments):
    """What a process of its own measures, bytes."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def row(what, measured, estimated):
    """A row of the table, and whether it misses the goal."""
    ratio = measured / estimated
    return [what, f"{measured / 1e6:.0f}", f"{estimated / 1e6:.0f}", f"{ratio:.2f}"], abs(
        ratio - 1
    ) > 0.2


def main():
    sys.path.insert(0, str(data_model.ROOT))
    from mindrlhf.plan import memory

    rows = []
    for change in SHAPES:
        shape = {**BASE, **change}
        what = ", ".join(f"{key} {value}" for key, value in change.items()) or "base"
        rows.append(row(what, child(shape), estimate(shape)))
    for name, positions, chunk_size, copies in LOGPS:
        logits = (chunk_size or positions) * VOCABULARY * 4
        rows.append(
            row(
                f"{name}, {positions} positions, chunks of {chunk_size or 'all'}",
                child(name, positions, chunk_size),
                logits * getattr(memory, copies),
            )
        )
    print("base:", ", ".join(f"{key} {value}" for key, value in BASE.items()))
    data_model.table(
        "a training step of GLM-4's layers, then log-probs alone",
        ["shape", "measured, MB", "estimated", "ratio"],
        [cells for cells, _ in rows],
    )
    print(f"{sum(missed for _, missed in rows)} of {len(rows)} miss 20 %")


if __name__ == "__main__":
    if sys.argv[1:]:
        given = json.loads(sys.argv[1])
        print(measure(*given) if len(given) == 1 else measure_logps(*given))
    else:
        main()
