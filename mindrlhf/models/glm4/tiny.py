"""A tiny GLM-4 with random weights and its own tokenizer, for a rehearsal on a CPU.

It is a Hugging Face folder like that of GLM-4-9B: config.json, shards of safetensors and
tokenizer.model.
"""
from __future__ import annotations

import base64
import collections
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import regex

from mindrlhf import config
from mindrlhf.checkpoints.tensors import TensorItem
from mindrlhf.models.glm4 import hf, weight_names
from mindrlhf.models.glm4.model_config import SIZES, ModelConfig

SPECIAL_TOKENS = 14  # ChatGLM4Tokenizer appends them to the file's vocabulary
SHARDS = 2  # of the weights, so that the rehearsal reads several files
# GLM-4's tokenizer splits text by this pattern before it merges bytes
SPLIT = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def write_model(folder: Path, config_path: str | Path,
                make_tokens: Callable[[int], list[bytes]]) -> int:
    """Write the model.

    Args:
        folder: a new folder.
        config_path: YAML with the sizes, such as glm4_tiny.yaml.
        make_tokens: number of tokens -> the tokenizer's tokens, by rank.

    Returns:
        number of parameters.
    """
    settings = config.read_yaml(config_path)["model"]["model_config"]
    vocabulary = settings["padded_vocab_size"] - SPECIAL_TOKENS
    sizes = {name: settings[name] for name in SIZES}
    model = ModelConfig(
        **sizes, layernorm_epsilon=settings["layernorm_epsilon"],
        rope_ratio=settings["rope_ratio"],
        eos_token_id=(vocabulary, vocabulary + 7, vocabulary + 9), pad_token_id=vocabulary,
        max_position_embeddings=8192)
    tensors = make_weights(model)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    items = [TensorItem.of_array(name, "F32", tensor) for name, tensor in tensors.items()]
    hf.write_hf_folder(folder, model, "glm", "F32", items, shard_size=nbytes // SHARDS)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n"
             for rank, token in enumerate(make_tokens(vocabulary))]
    (folder / "tokenizer.model").write_text("".join(lines))
    return sum(tensor.size for tensor in tensors.values())


def make_weights(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face tensors of a random GLM-4: name -> float32 array. Matrices are N(0, 0.02)."""
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in weight_names.hf_shapes(model, "glm").items():
        if "norm" in name:
            tensors[name] = np.ones(shape, np.float32)
        elif name.endswith("bias"):
            tensors[name] = np.zeros(shape, np.float32)
        else:
            tensors[name] = generator.normal(0, 0.02, shape).astype(np.float32)
    return tensors


def train_tokenizer(text: str, size: int) -> list[bytes]:
    """Byte pair encoding: `size` tokens, the 256 bytes first, then merges in order."""
    words = collections.Counter(tuple(bytes([byte]) for byte in word.encode())
                                for word in SPLIT.findall(text))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        pairs: collections.Counter[tuple[bytes, bytes]] = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        merged: collections.Counter[tuple[bytes, ...]] = collections.Counter()
        for word, count in words.items():
            merged[_join(word, best)] += count
        words = merged
    return tokens


def _join(word: Sequence[bytes], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """A word with every occurrence of a pair merged into one token."""
    pieces, position = [], 0
    while position < len(word):
        step = 2 if word[position:position + 2] == pair else 1
        pieces.append(b"".join(word[position:position + step]))
        position += step
    return tuple(pieces)
