"""GLM-4 weights: a Hugging Face folder (safetensors) to one MindSpore checkpoint, and back.

Neither torch nor transformers is needed, and no code from the folder runs.
"""
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindrlhf import checkpoint, cli
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import weights

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
EXAMPLE = "  python convert_weight.py --model glm-n --input_path glm-4-9b-chat/ --output_path glm4_9b.ckpt --dtype bf16"


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--model", required=True, choices=["glm-n"], help="the model family: GLM-4")
    parse.add_argument("--input_path", required=True, help="folder with config.json and *.safetensors, any number")
    parse.add_argument("--output_path", required=True, help="checkpoint to write; ends in .ckpt or .safetensors")
    parse.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="precision of the output (default: bf16)")
    parse.add_argument("--allow_nonfinite", action="store_true", help="let NaN and inf in the weights pass")
    return parse


def read_folder(folder):
    """Config and tensors of a Hugging Face folder.

    Returns:
        (dict of config.json, {name: StoredTensor}) over all shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --input_path takes the folder that holds config.json and *.safetensors")
    path = cli.existing_file(folder / "config.json", "the model's config.json")
    config = _read_json(path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        mapping = _read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(shard, str) for shard in mapping.values()):
            raise UserError(f"{index}: has no weight_map of names; download it again")
        shards = sorted(set(mapping.values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise UserError(f"{index}: lists {', '.join(absent)}, not in the folder; download the missing shards")
    else:
        mapping, shards = None, sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        pickles = any(folder.glob("*.bin"))
        raise UserError(f"{folder}: holds no *.safetensors" + (
            "; .bin files are pickles, which can run code and are not read: download the safetensors of this model, "
            "or save it with save_pretrained(..., safe_serialization=True)" if pickles else ""))
    tensors, origin = {}, {}
    for shard in shards:
        for name, tensor in checkpoint.read(folder / shard).items():
            if name in tensors:
                raise UserError(f"{folder}: {name} stands in both {origin[name]} and {shard}; remove one")
            tensors[name], origin[name] = tensor, shard
    for name, shard in (mapping or {}).items():
        if origin.get(name) != shard:
            raise UserError(f"{index}: puts {name} into {shard}, which has no such tensor; download both again")
    return config, tensors


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object expected; download it again")
    return content


def plan(folder, dtype, *, allow_nonfinite=False):
    """The tensors of the MindSpore checkpoint, made when they are written.

    Returns:
        (Numbers, list of (name, dtype, shape, make)) as checkpoint.write takes them.
    """
    config, tensors = read_folder(folder)
    numbers = weights.read_numbers(config, Path(folder) / "config.json")
    layout = "glm" if any(name.startswith("model.") for name in tensors) else "chatglm"
    tensors.pop(weights.DERIVED, None)
    problem = checkpoint.difference(weights.hf_shapes(numbers, layout), {n: t.shape for n, t in tensors.items()})
    if problem:
        raise UserError(f"{folder}: the weights are not those of config.json. {problem}")
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]
    if odd:
        raise UserError(f"{folder}: {odd[0]} is {tensors[odd[0]].dtype}; weights are F32, F16 or BF16")

    def make(name, parts):
        stored = [tensors[part] for part, _ in parts]
        values = [checkpoint.convert(tensor.array(), tensor.dtype, dtype) for tensor in stored]
        if not allow_nonfinite:
            for tensor, value in zip(stored, values):
                _check_finite(tensor, value, dtype)
        return values[0] if len(values) == 1 else np.concatenate(values)

    items = []
    for name, shape in weights.shapes(numbers).items():
        parts = weights.hf_parts(name, numbers, layout)
        items.append((name, dtype, shape, lambda name=name, parts=parts: make(name, parts)))
    return numbers, items


def _check_finite(tensor, value, dtype):
    if _finite(value, dtype):
        return
    if _finite(tensor.array(), tensor.dtype):
        raise UserError(f"{tensor.name}: a value is beyond {dtype}'s range; convert with --dtype bf16 or fp32")
    raise UserError(f"{tensor.name}: holds NaN or inf; the download is damaged, or pass --allow_nonfinite")


def _finite(array, dtype):
    if dtype == "BF16":  # all exponent bits set: inf or NaN
        return not ((array & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def main(argv=None):
    arguments = parser().parse_args(argv)
    dtype = DTYPES[arguments.dtype]
    numbers, items = plan(arguments.input_path, dtype, allow_nonfinite=arguments.allow_nonfinite)
    size = sum(int(np.prod(shape)) * checkpoint.DTYPES[dtype][1].itemsize for _, _, shape, _ in items)
    with tqdm(total=size, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        checkpoint.write(arguments.output_path, items, bar.update)
    print(f"{arguments.output_path}: {len(items)} parameters, {size / 1e9:.2f} GB, {arguments.dtype}; "
          f"{numbers.num_layers} layers, rope_ratio {numbers.rope_ratio}, layernorm_epsilon {numbers.layernorm_epsilon}")


if __name__ == "__main__":
    cli.run(main)
