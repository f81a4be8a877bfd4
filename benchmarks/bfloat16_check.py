"""How far does bfloat16 move the numbers of mindrlhf.check? Where its tolerances for NPUs come from.

    PYTHONPATH=. python benchmarks/bfloat16_check.py

The CPU has no bfloat16, so it is imitated: in float32, inputs and outputs of every matrix product and of the softmax
are rounded to as many bits, forwards and backwards. float16, which the CPU has, tells whether the imitation is right.
"""

import contextlib
import io
import re

from mindspore import nn

from mindrlhf import check
from mindrlhf.cpu import patches

WAYS = (
    ("float32", None, "float32"),
    ("float16", None, "float16"),
    ("11 bits, as float16", 11, "float32"),
    ("8 bits, as bfloat16", 8, "float32"),
)
FOUND = {
    "log-probs, nats": "PyTorch's log-probs",
    "loss, nats": "PyTorch's loss",
    "norm, share": "PyTorch's norm",
}


class Rounded(nn.Cell):
    """A cell whose inputs and outputs keep so many bits: float32's 24 less those that adding and taking away a large
    multiple loses (Veltkamp). The multiple's own rounding does the same to gradients."""

    def __init__(self, cell, bits):
        super().__init__(auto_prefix=False)
        self.cell, self.factor = cell, float(2 ** (24 - bits) + 1)

    def shorten(self, value):
        large = value * self.factor
        return large - (large - value)

    def construct(self, *values):
        """Any number of float tensors -> what the cell gives."""
        short = ()
        for value in values:
            short += (self.shorten(value),)
        return self.shorten(self.cell(*short))


def shorten_all(network, bits):
    """Round in every layer. Parameters keep their names."""
    names = [(parameter, parameter.name) for parameter in network.get_parameters()]
    for layer in network.transformer.encoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.core_attention.softmax = Rounded(attention.core_attention.softmax, bits)
        for owner, name in (
            (attention, "query_key_value"),
            (attention, "dense"),
            (attention, "core_attention"),
            (mlp, "dense_h_to_4h"),
            (mlp, "dense_4h_to_h"),
        ):
            setattr(owner, name, Rounded(getattr(owner, name), bits))
    for _, cell in list(network.sequence_logps.cells_and_names()):
        if "output_layer" in cell.name_cells():
            cell.output_layer = Rounded(cell.output_layer, bits)
    for parameter, name in names:
        parameter.name = name
    return network


def measure(bits, dtype):
    """What the check finds: list of numbers, in the order of FOUND."""
    way = check.Precision(
        "x", "glm4_tiny.yaml", 9.0, 9.0, 9.0, {"model.model_config.compute_dtype": dtype}
    )
    plain, check.PRECISIONS["CPU"] = check.build, (way,)
    if bits:
        check.build = lambda *arguments: shorten_all(plain(*arguments), bits)
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        check.main(["--device_target", "CPU", "--workers", "1"])
    check.build = plain
    return [re.search(rf"{start}.*off by (\S+)", screen.getvalue())[1] for start in FOUND.values()]


def main():
    check.check_lora = lambda *_: None  # its adapters do not find the rounded cells
    patches.optimize_cpu = lambda _, __: None  # MindFormers' own cells, which an NPU runs
    print(f"{'':<22}" + "".join(f"{title:>18}" for title in FOUND))
    for title, bits, dtype in WAYS:
        print(
            f"{title:<22}" + "".join(f"{number:>18}" for number in measure(bits, dtype)), flush=True
        )


if __name__ == "__main__":
    main()
