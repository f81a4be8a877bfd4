"""GLM-4 as a Hugging Face folder: config.json, an index, shards of safetensors. No code from there runs."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from mindrlhf.checkpoints.containers import open_tensors, write_tensors
from mindrlhf.checkpoints.strict import describe_difference
from mindrlhf.checkpoints.tensors import count_bytes, round_to
from mindrlhf.cli import UserError, existing_file
from mindrlhf.files import atomic_folder, read_json, write_json
from mindrlhf.models.glm4 import model_config, weight_names

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names in a config.json
SHARD = 5_000_000_000  # bytes of a shard, at most (a larger tensor has one for itself)


def read_hf_folder(folder):
    """The model in a folder, of either spelling.

    Returns:
        (Numbers, layout "glm" or "chatglm", {name: StoredTensor} without what the model derives).

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "; --reversed takes a file" if folder.is_file() else ""
        raise UserError(f"{folder}: no such folder; --input_path takes one with config.json and *.safetensors"
                        + hint)
    config_path = existing_file(folder / "config.json", "the model's config.json")
    config = read_json(config_path)
    numbers = model_config.parse_hf_config(config, config_path)
    _check_dtype(config, config_path)
    tensors = _read_shards(folder)
    layout = "glm" if any(name.startswith("model.") for name in tensors) else "chatglm"
    derived = tensors.pop(weight_names.INV_FREQ, None)
    problem = describe_difference(weight_names.hf_shapes(numbers, layout), {name: t.shape for name, t in tensors.items()})
    if problem:
        raise UserError(f"{folder}: the weights are not those of its config.json. {problem}")
    odd = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if odd:
        raise UserError(f"{folder}: {odd[0]}; weights are {', '.join(DTYPES)}")
    if derived and derived.dtype in DTYPES:
        numbers = replace(numbers, inv_freq=tuple(derived.float32().tolist()))
    return numbers, layout, tensors


def _check_dtype(config, place):
    """torch_dtype (transformers 4) and dtype (5) must be known and agree; the tensors say what they are."""
    given = {key: config[key] for key in ("torch_dtype", "dtype") if config.get(key) is not None}
    unknown = any(value not in DTYPES.values() for value in given.values())
    if unknown or len(set(given.values())) > 1:
        said = ", ".join(f"{key} {value!r}" for key, value in given.items())
        raise UserError(f"{place}: says {said}; one of {', '.join(DTYPES.values())} expected")


def _read_shards(folder):
    index = folder / INDEX
    if index.exists():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(
                isinstance(shard, str) and shard == Path(shard).name for shard in mapping.values()):
            raise UserError(f"{index}: has no weight_map of file names; download it again")
        shards = sorted(set(mapping.values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise UserError(f"{index}: lists {', '.join(absent)}, not in the folder; download what is "
                            "missing")
    else:
        mapping, shards = {}, sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise UserError(f"{folder}: holds no *.safetensors; " + (
            ".bin files are pickles, which can run code, and are not read: download the safetensors of this "
            "model, or save it with save_pretrained(..., safe_serialization=True)" if pickles else
            "download the weights"))
    tensors, origin = {}, {}
    for shard in shards:
        for name, tensor in open_tensors(folder / shard).items():
            if name in tensors:
                raise UserError(f"{folder}: {name} stands in both {origin[name]} and {shard}; remove one")
            tensors[name], origin[name] = tensor, shard
    for name, shard in mapping.items():
        if origin.get(name) != shard:
            raise UserError(f"{index}: puts {name} into {shard}, which has none; download both again")
    return tensors


def write_hf_folder(folder, numbers, layout, dtype, tensors, progress=None, *, shard_size=None):
    """Write a folder that transformers and vLLM open; it appears when it is whole.

    Args:
        folder: a name that is free, or an empty folder.
        numbers: Numbers.
        layout: "glm", or "chatglm" for the names of the original repositories.
        dtype: F32, F16 or BF16, of every tensor.
        tensors: list of (name, dtype, shape, make) as formats.write takes them, in the names of the layout.
        progress: called with the number of bytes after each piece.
        shard_size: bytes of a file, at most, unless one tensor is larger; None: SHARD.
    """
    if layout == "chatglm":
        derived = round_to(np.array(numbers.inv_freq or _inv_freq(numbers), np.float32), dtype)
        tensors = [*tensors, (weight_names.INV_FREQ, dtype, derived.shape, lambda: derived)]
    shards, size = [[]], 0
    for tensor in tensors:
        if size and size + count_bytes(*tensor[1:3]) > (shard_size or SHARD):
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += count_bytes(*tensor[1:3])
    mapping = {}
    with atomic_folder(folder) as target:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(target / name, shard, progress, framework="pt", hashed=False)
            mapping |= {tensor[0]: name for tensor in shard}
        total = sum(count_bytes(*tensor[1:3]) for tensor in tensors)
        write_json(target / INDEX, {"metadata": {"total_size": total},
                                    "weight_map": dict(sorted(mapping.items()))})
        write_json(target / "config.json", config_json(numbers, layout, dtype))
        write_json(target / "generation_config.json", {"eos_token_id": list(numbers.eos_token_id),
                                                       "pad_token_id": numbers.pad_token_id})


def _inv_freq(numbers):
    """The rotary embedding's frequencies, theta ** (-2 i / d) of d = kv_channels / 2 rotated channels."""
    rotated = numbers.kv_channels // 2
    return (model_config.THETA * numbers.rope_ratio) ** -(np.arange(0, rotated, 2) / rotated)


def config_json(numbers, layout, dtype):
    """config.json of a model: for transformers' GlmForCausalLM (4 and 5 spell the rotary base differently;
    both are given), or for the code of the original repositories."""
    common = {"hidden_size": numbers.hidden_size, "num_attention_heads": numbers.num_attention_heads,
              "vocab_size": numbers.padded_vocab_size, "eos_token_id": list(numbers.eos_token_id),
              "pad_token_id": numbers.pad_token_id, "tie_word_embeddings": False, "use_cache": True,
              "attention_dropout": 0.0, "torch_dtype": DTYPES[dtype]}
    if layout == "glm":
        rope = {"rope_theta": float(model_config.THETA * numbers.rope_ratio), "partial_rotary_factor": 0.5}
        return {"architectures": ["GlmForCausalLM"], "model_type": "glm", **common, **rope,
                "rope_parameters": {"rope_type": "default", **rope}, "hidden_act": "silu",
                "attention_bias": True, "num_hidden_layers": numbers.num_layers,
                "intermediate_size": numbers.ffn_hidden_size, "head_dim": numbers.kv_channels,
                "num_key_value_heads": numbers.multi_query_group_num,
                "rms_norm_eps": numbers.layernorm_epsilon, "initializer_range": 0.02,
                "max_position_embeddings": numbers.max_position_embeddings}
    code = "modeling_chatglm.ChatGLMForConditionalGeneration"
    return {"architectures": ["ChatGLMModel"], "model_type": "chatglm", **common,
            "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": code,
                         "AutoModelForCausalLM": code, "AutoModelForSeq2SeqLM": code},
            "num_layers": numbers.num_layers, "num_hidden_layers": numbers.num_layers,
            "padded_vocab_size": numbers.padded_vocab_size, "ffn_hidden_size": numbers.ffn_hidden_size,
            "kv_channels": numbers.kv_channels, "multi_query_attention": True,
            "multi_query_group_num": numbers.multi_query_group_num,
            "seq_length": numbers.max_position_embeddings, "layernorm_epsilon": numbers.layernorm_epsilon,
            "rmsnorm": True, "rope_ratio": numbers.rope_ratio,
            "original_rope": True, "add_bias_linear": False, "add_qkv_bias": True, "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False, "apply_query_key_layer_scaling": True,
            "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "fp32_residual_connection": False,
            "hidden_dropout": 0.0}
