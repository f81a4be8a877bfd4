"""GLM-4 as a Hugging Face folder: config.json, an index, shards of safetensors.

No code from such a folder is executed.
"""
from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.checkpoints.containers import open_tensors, write_tensors
from mindrlhf.checkpoints.strict import describe_difference
from mindrlhf.checkpoints.tensors import StoredTensor, TensorItem, round_to
from mindrlhf.cli import UserError, existing_file
from mindrlhf.files import atomic_folder
from mindrlhf.json_files import read_json, write_json
from mindrlhf.models.glm4 import model_config, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names in a config.json
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SHARD = 5_000_000_000  # bytes of a shard, at most; a larger tensor has a shard of its own


class HfFolder(NamedTuple):
    """A model in a Hugging Face folder.

    Attributes:
        config: sizes and constants.
        layout: "glm" or "chatglm", see weight_names.
        tensors: name -> tensor, without those that the model computes.
    """
    config: ModelConfig
    layout: str
    tensors: dict[str, StoredTensor]


def read_hf_folder(folder: str | Path) -> HfFolder:
    """Open the model in a folder, in either layout.

    Raises:
        UserError: a file is missing or damaged, or the weights do not match config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "; --reversed takes a file" if folder.is_file() else ""
        raise UserError(f"{folder}: no such folder; --input_path takes one with config.json and "
                        f"*.safetensors{hint}")
    config_path = existing_file(folder / "config.json", "the model's config.json")
    content = read_json(config_path)
    config = model_config.parse_hf_config(content, config_path)
    _check_dtype(content, config_path)
    tensors = _read_shards(folder)
    layout = "glm" if any(name.startswith("model.") for name in tensors) else "chatglm"
    inv_freq = tensors.pop(weight_names.INV_FREQ, None)
    problem = describe_difference(weight_names.hf_shapes(config, layout),
                                  {name: tensor.shape for name, tensor in tensors.items()})
    if problem:
        raise UserError(f"{folder}: the weights do not match its config.json. {problem}")
    invalid = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items()
               if tensor.dtype not in DTYPES]
    if invalid:
        raise UserError(f"{folder}: {invalid[0]}; weights must be {', '.join(DTYPES)}")
    if inv_freq and inv_freq.dtype in DTYPES:
        config = replace(config, inv_freq=tuple(inv_freq.float32().tolist()))
    return HfFolder(config, layout, tensors)


def _check_dtype(content: dict[str, Any], place: Path) -> None:
    """Check torch_dtype (transformers 4) and dtype (5). The tensors' own dtypes are used."""
    given = {key: content[key] for key in ("torch_dtype", "dtype") if content.get(key) is not None}
    unknown = any(value not in DTYPES.values() for value in given.values())
    if unknown or len(set(given.values())) > 1:
        found = ", ".join(f"{key} {value!r}" for key, value in given.items())
        raise UserError(f"{place}: has {found}; give one of {', '.join(DTYPES.values())}")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards of a folder.

    Raises:
        UserError: shards and index do not match, or there are none.
    """
    index = folder / INDEX
    mapping = _read_index(index) if index.exists() else {}
    shards = sorted(set(mapping.values()) if index.exists()
                    else {file.name for file in folder.glob("*.safetensors")})
    if not shards:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise UserError(f"{folder}: holds no *.safetensors; " + (
            ".bin files are pickles, which can run code, and are not read: download the "
            "safetensors of this model, or save it with save_pretrained(..., "
            "safe_serialization=True)" if pickles else "download the weights"))
    tensors: dict[str, StoredTensor] = {}
    origin: dict[str, str] = {}
    for shard in shards:
        for name, tensor in open_tensors(folder / shard).items():
            if name in tensors:
                raise UserError(f"{folder}: {name} is in both {origin[name]} and {shard}; remove "
                                "one of them")
            tensors[name], origin[name] = tensor, shard
    for name, shard in mapping.items():
        if origin.get(name) != shard:
            raise UserError(f"{index}: lists {name} in {shard}, which does not have it; download "
                            "both again")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of its shard.

    Raises:
        UserError: the index is damaged, or lists a file that is missing.
    """
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(
            isinstance(shard, str) and shard == Path(shard).name for shard in mapping.values()):
        raise UserError(f"{index}: has no weight_map of file names; download it again")
    missing = [shard for shard in sorted(set(mapping.values()))
               if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(f"{index}: lists {', '.join(missing)}, not in the folder; download what is "
                        "missing")
    return mapping


def write_hf_folder(folder: str | Path, config: ModelConfig, layout: str, dtype: str,
                    tensors: Sequence[TensorItem], progress: Callable[[int], object] | None = None,
                    extra: Sequence[Path] = (), *, shard_size: int | None = None,
                    documents: Mapping[str, bytes] | None = None) -> None:
    """Write a folder that transformers and vLLM open. It appears when it is complete.

    Args:
        folder: a path that does not exist, or an empty folder.
        config: sizes and constants of the model.
        layout: "glm", or "chatglm" for the names of the original repositories.
        dtype: F32, F16 or BF16, of every tensor.
        tensors: with the names of the layout.
        progress: called with the number of bytes after each piece.
        extra: files to copy into the folder.
        shard_size: bytes of a file, at most, unless one tensor is larger; None: SHARD.
        documents: name -> content of more files.
    """
    if layout == "chatglm":
        inv_freq = round_to(np.array(config.inv_freq or _inv_freq(config), np.float32), dtype)
        tensors = [*tensors, TensorItem.of_array(weight_names.INV_FREQ, dtype, inv_freq)]
    shards: list[list[TensorItem]] = [[]]
    size = 0
    for tensor in tensors:
        if size and size + tensor.spec.nbytes > (shard_size or SHARD):
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    mapping: dict[str, str] = {}
    with atomic_folder(folder) as target:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(target / name, shard, progress, framework="pt", hashed=False)
            mapping |= {tensor.name: name for tensor in shard}
        total = sum(tensor.spec.nbytes for tensor in tensors)
        write_json(target / INDEX, {"metadata": {"total_size": total},
                                    "weight_map": dict(sorted(mapping.items()))})
        write_json(target / "config.json", config_json(config, layout, dtype))
        write_json(target / "generation_config.json", {"eos_token_id": list(config.eos_token_id),
                                                       "pad_token_id": config.pad_token_id})
        for file in extra:
            shutil.copyfile(file, target / file.name)
        for name, content in (documents or {}).items():
            (target / name).write_bytes(content)


def find_tokenizer(place: str | Path, *, required: bool) -> list[Path]:
    """The files of a tokenizer.

    Args:
        place: one of them, or their folder.
        required: whether there must be some.

    Raises:
        UserError: there is none, but one is required.
    """
    place = Path(place)
    if place.is_file() and required:
        return [place]
    found = [place / name for name in TOKENIZER if (place / name).is_file()]
    if required and not found:
        raise UserError(f"{place}: holds no tokenizer; give the model's tokenizer.model, or a "
                        f"folder with it ({', '.join(TOKENIZER)})")
    return found


def _inv_freq(config: ModelConfig) -> np.ndarray:
    """Frequencies of the rotary embedding: theta ** (-2 i / d), d = kv_channels / 2 channels."""
    rotated = config.kv_channels // 2
    return (model_config.THETA * config.rope_ratio) ** -(np.arange(0, rotated, 2) / rotated)


def config_json(config: ModelConfig, layout: str, dtype: str) -> dict[str, Any]:
    """The content of a config.json.

    Args:
        config: sizes and constants of the model.
        layout: "glm" for transformers' GlmForCausalLM, "chatglm" for the original repositories.
        dtype: a key of DTYPES.
    """
    common = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.padded_vocab_size,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": False,
        "use_cache": True,
        "attention_dropout": 0.0,
        "torch_dtype": DTYPES[dtype],
    }
    return _glm_json(config, common) if layout == "glm" else _chatglm_json(config, common)


def _glm_json(config: ModelConfig, common: dict[str, Any]) -> dict[str, Any]:
    """config.json for transformers' GlmForCausalLM.

    Versions 4 and 5 spell the rotary base differently, so both spellings are given.
    """
    rope = {
        "rope_theta": float(model_config.THETA * config.rope_ratio),
        "partial_rotary_factor": 0.5,
    }
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        **common,
        **rope,
        "rope_parameters": {"rope_type": "default", **rope},
        "hidden_act": "silu",
        "attention_bias": True,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn_hidden_size,
        "head_dim": config.kv_channels,
        "num_key_value_heads": config.multi_query_group_num,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _chatglm_json(config: ModelConfig, common: dict[str, Any]) -> dict[str, Any]:
    """config.json for the code of the original repositories."""
    code = "modeling_chatglm.ChatGLMForConditionalGeneration"
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        **common,
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": code,
            "AutoModelForCausalLM": code,
            "AutoModelForSeq2SeqLM": code,
        },
        "num_layers": config.num_layers,
        "num_hidden_layers": config.num_layers,
        "padded_vocab_size": config.padded_vocab_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels": config.kv_channels,
        "multi_query_attention": True,
        "multi_query_group_num": config.multi_query_group_num,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.layernorm_epsilon,
        "rmsnorm": True,
        "rope_ratio": config.rope_ratio,
        "original_rope": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
    }
