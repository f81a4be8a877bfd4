"""Make a tiny GLM-4 with random weights, its tokenizer and sample pairs for a rehearsal on a CPU.

The files have the formats that users of GLM-4-9B have: a Hugging Face folder (config.json,
safetensors, tokenizer.model) and pairs with the fields of CValues-Comparison.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jsonlines

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli
from mindrlhf.data import samples
from mindrlhf.data.formats import FORMATS
from mindrlhf.models.glm4 import tiny

EXAMPLE = "  python make_tiny_glm4.py --output_path tiny/"


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--output_path", required=True,
                       help="folder for hf/ (the model), train.jsonl and held_out.jsonl")
    parse.add_argument("--config", default=str(Path(__file__).with_name("glm4_tiny.yaml")),
                       help="YAML with the sizes of the model (default: glm4_tiny.yaml)")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model and the pairs."""
    arguments = parser().parse_args(argv)
    folder = Path(arguments.output_path)
    pairs = dict(zip(("train", "held_out"), samples.make_pairs()))
    text = "\n".join(row[name] for row in pairs["train"] for name in FORMATS["cvalues"].fields)
    size = tiny.write_model(folder / "hf", arguments.config,
                            partial(tiny.train_tokenizer, text))
    for name, rows in pairs.items():
        with jsonlines.open(folder / f"{name}.jsonl", "w") as file:
            file.write_all(rows)
    print(f"{folder}: a GLM-4 of {size:,} parameters, {len(pairs['train'])} training pairs, "
          f"{len(pairs['held_out'])} held-out pairs")


if __name__ == "__main__":
    cli.run_command(main)
