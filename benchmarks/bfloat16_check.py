"""How far off are the results of mindrlhf.check in bfloat16?

    python benchmarks/bfloat16_check.py

Prints a table with one line per precision: errors of log-probs, loss and gradient norm against
PyTorch. The check's tolerances for NPUs follow from them. MindSpore's CPU kernels have no bfloat16,
so it is emulated: in float32, inputs and outputs of every matrix product and of the softmax are
rounded to as many bits, forward and backward. float16, which the CPU has, shows whether the
emulation is accurate.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from typing import Any

import processes  # noqa: F401  puts mindrlhf on the path
from mindspore import Tensor, nn

from mindrlhf import check
from mindrlhf.cpu import patches

# title, significant bits to round to, MindSpore's type
PRECISIONS = (
    ("float32", None, "float32"),
    ("float16", None, "float16"),
    ("11 bits, as float16", 11, "float32"),
    ("8 bits, as bfloat16", 8, "float32"),
)
# column of the table -> regular expression for the line that the check prints
COLUMNS = {
    "log-probs, nats": "log-probs of .* PyTorch's",
    "loss, nats": "loss with other references",
    "norm, relative": "gradient norm is PyTorch's",
}


class Rounded(nn.Cell):
    """A cell whose inputs and outputs keep only some of float32's 24 significant bits.

    Adding and subtracting a large multiple drops the other bits (Veltkamp splitting). The rounding
    of that multiple does the same to the gradients.
    """

    def __init__(self, cell: nn.Cell, bits: int):
        super().__init__(auto_prefix=False)
        self.cell, self.factor = cell, float(2 ** (24 - bits) + 1)

    def shorten(self, value: Tensor) -> Tensor:
        """Any float32 tensor, rounded."""
        large = value * self.factor
        return large - (large - value)

    def construct(self, *values: Tensor) -> Tensor:
        """Any number of float tensors -> the cell's output."""
        short = ()
        for value in values:
            short += (self.shorten(value),)
        return self.shorten(self.cell(*short))


def round_cells(network: nn.Cell, bits: int) -> nn.Cell:
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


def measure(bits: int | None, dtype: str) -> list[str]:
    """Errors that the check prints, in the order of COLUMNS."""
    precision = check.Precision(
        "x", "glm4_tiny.yaml", 9.0, 9.0, 9.0, {"model.model_config.compute_dtype": dtype}
    )
    plain, check.PRECISIONS["CPU"] = check.build_and_load, (precision,)

    def build_rounded(*arguments: Any, **options: Any) -> nn.Cell:
        return round_cells(plain(*arguments, **options), bits)

    if bits:
        check.build_and_load = build_rounded
    screen = io.StringIO()
    # only the errors matter here, not whether the check passes
    with contextlib.redirect_stdout(screen), contextlib.suppress(SystemExit):
        check.main(["--device_target", "CPU", "--workers", "1"])
    check.build_and_load = plain
    found = [re.search(rf"{line}.*off by (\S+)", screen.getvalue()) for line in COLUMNS.values()]
    if not all(found):
        sys.exit(screen.getvalue())
    return [match[1] for match in found]


def main() -> None:
    """Print the table."""
    check.check_lora = lambda *_: None  # LoRA does not find the rounded cells
    patches.optimize_cpu = lambda *_: None  # keep MindFormers' own cells, which an NPU runs
    print(f"{'':<22}" + "".join(f"{title:>18}" for title in COLUMNS))
    for title, bits, dtype in PRECISIONS:
        print(
            f"{title:<22}" + "".join(f"{number:>18}" for number in measure(bits, dtype)), flush=True
        )


if __name__ == "__main__":
    main()
