"""GLM-4 weights: a Hugging Face folder (safetensors) to one MindSpore checkpoint, or back with --reversed.

Neither torch nor transformers is needed, and no code from the folder runs. A tensor is never in memory as a
whole. Beside the checkpoint goes its sidecar, <output_path>.json: the numbers of config.json, which the other
commands compare with their YAML, and which --reversed needs.
"""
import math
import signal
from dataclasses import asdict, dataclass

import numpy as np

from mindrlhf import cli, files
from mindrlhf.checkpoints import containers, strict, tensors
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, sidecar, weight_names

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
EXAMPLE = """  python convert_weight.py --model glm-n --input_path glm-4-9b-chat/ --output_path glm4_9b.ckpt
  python convert_weight.py --model glm-n --reversed --input_path merged.ckpt --output_path glm-4-9b-dpo/"""


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--model", required=True, choices=["glm-n"], help="the model family: GLM-4")
    parse.add_argument("--input_path", required=True,
                       help="folder with config.json and *.safetensors; reversed: a .ckpt or .safetensors")
    parse.add_argument("--output_path", required=True,
                       help="file to write, ends in .ckpt or .safetensors; reversed: a new folder")
    parse.add_argument("--dtype", default="bf16", choices=list(DTYPES),
                       help="precision of the output (default: bf16)")
    parse.add_argument("--reversed", action="store_true", help="MindSpore to Hugging Face")
    parse.add_argument("--hf_layout", choices=["glm", "chatglm"],
                       help="reversed: glm, for transformers' GlmForCausalLM and vLLM (default); chatglm, "
                            "names of the original repositories, whose *.py you add")
    parse.add_argument("--config", metavar="FILE",
                       help="reversed, for a checkpoint without a sidecar: config.json of the model that it "
                            "comes from, or a sidecar")
    parse.add_argument("--allow_nonfinite", action="store_true", help="let NaN and inf in the input pass")
    return parse


@dataclass(frozen=True)
class Conversion:
    """How values become those of the output: its dtype, a key of tensors.DTYPES; may NaN and inf pass."""
    dtype: str
    allow_nonfinite: bool

    def item(self, name, shape, ranges):
        """A tensor as formats.write takes it.

        Args:
            name, shape: of the tensor.
            ranges: list of (StoredTensor, first element, number of elements): where its elements come from.
        """
        jobs = [(ranges, *piece) for piece in tensors.pieces(math.prod(shape))]
        return name, self.dtype, shape, lambda: tensors.in_order(self.piece, jobs)

    def piece(self, ranges, begin, count):
        """`count` converted elements from `begin` on, NumPy."""
        parts = []
        for stored, first, length in ranges:
            taken = min(max(length - begin, 0), count)
            if taken:
                parts.append(self.convert(stored, first + begin, taken))
            begin, count = max(begin - length, 0), count - taken
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def convert(self, stored, first, count):
        """Some elements of a StoredTensor, converted.

        Raises:
            UserError: NaN or inf in them, or a value beyond the range of dtype.
        """
        values = stored.read(first, count)
        made = tensors.convert(values, stored.dtype, self.dtype)
        good = tensors.finite(made, self.dtype)
        if good.all():
            return made
        sound, place = tensors.finite(values, stored.dtype), f"{stored.file.name}: {stored.name}"
        if (sound & ~good).any():
            worst = np.abs(tensors.widen(values[sound], stored.dtype)).max()
            raise UserError(f"{place} holds {worst:g}, beyond the range of the output (largest: "
                            f"{tensors.LARGEST[self.dtype]:g}); convert with another --dtype")
        if not self.allow_nonfinite:
            raise UserError(f"{place} holds NaN or inf; fetch it again if it was a download, or pass "
                            "--allow_nonfinite")
        return made


def to_mindspore(source, target, conversion, progress):
    """Hugging Face folder -> checkpoint file and its sidecar. Returns the Numbers."""
    containers.check_name(target)
    numbers, layout, stored = hf.read_folder(source)
    items = []
    for name, shape in weight_names.shapes(numbers).items():
        parts = [stored[part] for part, _ in weight_names.hf_parts(name, numbers, layout)]
        items.append(conversion.item(name, shape, [(part, 0, part.elements) for part in parts]))
    _announce(items, target, progress)
    sidecar.forget(target)  # it would describe other weights, if this were stopped
    identity = containers.write(target, items, progress.update)
    sidecar.write(target, numbers, dtype=conversion.dtype, fingerprint=identity, source=source,
                  source_layout=layout)
    return numbers


def to_hugging_face(source, target, conversion, progress, *, layout, config):
    """Checkpoint file -> Hugging Face folder. Returns the Numbers."""
    stored = containers.read(source)
    numbers = find_numbers(source, config)
    problem = strict.difference(weight_names.shapes(numbers), {name: t.shape for name, t in stored.items()})
    if problem:
        raise UserError(f"{source}: the weights are not those of its numbers. {problem}")
    items = []
    for name, shape in weight_names.shapes(numbers).items():
        row, first = math.prod(shape[1:]), 0
        for part, rows in weight_names.hf_parts(name, numbers, layout):
            count = (shape[0] if rows is None else rows) * row
            items.append(conversion.item(part, (count // row, *shape[1:]), [(stored[name], first, count)]))
            first += count
    _announce(items, target, progress)
    hf.write_folder(target, numbers, layout, conversion.dtype, items, progress.update)
    return numbers


def find_numbers(source, config):
    """Numbers of a checkpoint: of its sidecar, or of --config; both must agree where both are there."""
    numbers, path = sidecar.read_for(source)
    if config is None:
        if numbers is None:
            raise UserError(f"{source}: has no {sidecar.path_of(source).name} beside it; copy it there, or "
                            "give --config with the config.json of the model that it comes from")
        return numbers
    content = files.read_json(cli.existing_file(config, "a config.json or a sidecar"))
    given = sidecar.read_sidecar(config)[0] if "numbers" in content else weight_names.read_numbers(content, config)
    wrong = numbers and sidecar.differences(
        asdict(numbers), {name: getattr(given, name) for name in sidecar.IN_YAML})
    if wrong:
        raise UserError(f"{config}: is not of this checkpoint: " + "; ".join(
            f"{name} is {theirs} there, {ours} in {path}" for name, (ours, theirs) in wrong.items()))
    return given


def _announce(items, target, progress):
    """Tell the bar how many bytes there will be, and the user if the disk has no room for them."""
    progress.total = sum(tensors.size_of(dtype, shape) for _, dtype, shape, _ in items)
    progress.refresh()
    files.check_room(target, progress.total)


def main(argv=None):
    arguments = parser().parse_args(argv)
    layout = arguments.hf_layout or "glm"
    if not arguments.reversed and (arguments.hf_layout or arguments.config):
        raise UserError("--hf_layout and --config go with --reversed; see convert_weight.py --help")
    # the C library gives each piece's memory back and asks for it anew, unless it once saw a larger one freed
    np.empty(16 << 20, np.uint8)
    try:
        with cli.progress(None, "convert", "B", unit_scale=True) as progress:
            conversion = Conversion(DTYPES[arguments.dtype], arguments.allow_nonfinite)
            paths = arguments.input_path, arguments.output_path
            numbers = (to_hugging_face(*paths, conversion, progress, layout=layout, config=arguments.config)
                       if arguments.reversed else to_mindspore(*paths, conversion, progress))
    except KeyboardInterrupt:
        raise UserError(f"{arguments.output_path}: stopped; nothing was left there") from None
    cli.say(f"{arguments.output_path}: {progress.total / 1e9:.2f} GB, {arguments.dtype}; "
            f"{numbers.num_layers} layers, rope_ratio {numbers.rope_ratio}, "
            f"layernorm_epsilon {numbers.layernorm_epsilon}"
            + (f"; {layout} names; copy the model's tokenizer files there too" if arguments.reversed else ""))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill unwinds as Ctrl-C does
    cli.run(main)
