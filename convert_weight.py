"""Convert GLM-4's weights from a Hugging Face folder (safetensors) to one MindSpore checkpoint.

--reversed converts a checkpoint to a Hugging Face folder. Neither torch nor transformers is needed,
and no code from the folder is executed. Tensors are converted piece by piece, so memory does not
grow with the model. The sidecar <output_path>.json holds the model's sizes from config.json: the
other commands compare them with their YAML, and --reversed needs them.
"""
from __future__ import annotations

import signal
from collections.abc import Sequence

from mindrlhf import cli
from mindrlhf.models.glm4 import convert

EXAMPLE = """  python convert_weight.py --model glm-n --input_path glm-4-9b-chat/ \\
    --output_path glm4_9b.ckpt
  python convert_weight.py --model glm-n --reversed --input_path merged.ckpt \\
    --output_path glm-4-9b-dpo/"""


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--model", required=True, choices=["glm-n"],
                       help="model family: glm-n is GLM-4")
    parse.add_argument("--input_path", required=True,
                       help="folder with config.json and *.safetensors; with --reversed a .ckpt or "
                            ".safetensors file")
    parse.add_argument("--output_path", required=True,
                       help="file to write, .ckpt or .safetensors; with --reversed a new folder")
    parse.add_argument("--dtype", default="bf16", choices=list(convert.DTYPES),
                       help="precision of the output (default: bf16)")
    parse.add_argument("--reversed", action="store_true",
                       help="convert a MindSpore checkpoint to a Hugging Face folder")
    parse.add_argument("--hf_layout", choices=["glm", "chatglm"],
                       help="with --reversed: glm writes the weight names of transformers' "
                            "GlmForCausalLM, which vLLM reads too (default); chatglm writes those "
                            "of the original repositories, whose *.py files you must add")
    parse.add_argument("--config", metavar="FILE",
                       help="with --reversed, for a checkpoint without a sidecar: the model's "
                            "config.json, or a sidecar")
    parse.add_argument("--tokenizer", metavar="PATH",
                       help="with --reversed: tokenizer.model, or a folder with the tokenizer's "
                            "files, to copy into the new folder (default: those beside "
                            "--input_path)")
    parse.add_argument("--card", metavar="FOLDER",
                       help="with --reversed: output/card of the run, to write as the model card, "
                            "README.md (default: the card beside the checkpoint or its run)")
    parse.add_argument("--allow_nonfinite", action="store_true",
                       help="accept NaN and inf in the input")
    parse.add_argument("--overwrite", action="store_true",
                       help="replace a checkpoint file that holds other weights; not with "
                            "--reversed")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print one line about the result."""
    arguments = parser().parse_args(argv)
    only_reversed = ("hf_layout", "config", "tokenizer", "card")
    if not arguments.reversed and any(getattr(arguments, name) for name in only_reversed):
        raise cli.UserError("--hf_layout, --config, --tokenizer and --card need --reversed; see "
                            "convert_weight.py --help")
    if arguments.reversed and arguments.overwrite:
        raise cli.UserError("--overwrite replaces a checkpoint file; with --reversed, "
                            "--output_path is a new folder: leave --overwrite out")
    source, target = arguments.input_path, arguments.output_path
    dtype, allow_nonfinite = arguments.dtype, arguments.allow_nonfinite
    if arguments.reversed:
        from mindrlhf.card import model_card
        documents, remark = model_card.find_documents(source, arguments.card)
        cli.say(convert.to_hugging_face(source, target, layout=arguments.hf_layout or "glm",
                                        config=arguments.config, dtype=dtype,
                                        tokenizer=arguments.tokenizer, documents=documents,
                                        allow_nonfinite=allow_nonfinite), *filter(None, [remark]))
    else:
        cli.say(convert.to_mindspore(source, target, dtype=dtype,
                                     allow_nonfinite=allow_nonfinite,
                                     overwrite=arguments.overwrite))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up like Ctrl-C
    cli.run_command(main)
