"""LoRA: small adapters beside frozen weights (arXiv:2106.09685), W x + alpha / rank * B (A x).

The cells are MindFormers'. An adapter file holds A and B of every adapted matrix, and alpha and rank, so it says by itself
how it is merged. Without adapters the network is the reference, so preprocessed data serve LoRA and full training alike.
"""
from __future__ import annotations

import numpy as np

from mindrlhf.cli import UserError
from mindrlhf.models.glm4.weight_names import LORA_A, LORA_B, is_adapter

TARGETS = {"qkv": "query_key_value", "dense": "dense", "mlp": "dense_h_to_4h|dense_4h_to_h"}
METADATA = ("lora_rank", "lora_alpha")  # what an adapter file says of itself


def add_adapters(network, lora, *, compute_dtype, seed):
    """Put an adapter beside each target matrix and freeze all else.

    Args:
        network: a ChatGLM2 network, changed in place. B starts at zero, so what it computes does not change.
        lora: the section `lora` of the YAML: rank, alpha, dropout, target_modules.
        compute_dtype: name of the type in which adapters and their base matrices multiply: model_config.compute_dtype.
            MindFormers 1.3.0 would compute both in float16.
        seed: of the start of A, which is the same in every parallel plan.
    """
    from mindformers.pet.pet_config import LoraConfig
    from mindformers.pet.tuners.lora_adapter import LoraAdapter

    from mindrlhf.checkpoints.slices import ArrayTensor, FileTensor
    pattern = "|".join(TARGETS[target] for target in lora["target_modules"])
    LoraAdapter.get_pet_model(network.transformer.encoder, LoraConfig(
        lora_rank=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=f"({pattern})$",
        param_init_type="float32", compute_dtype=compute_dtype))
    for name, parameter in network.parameters_and_names():
        parameter.requires_grad = is_adapter(name)
        if is_adapter(name):
            parameter.name = name  # MindFormers names it within its cell only
            start = ArrayTensor(initial_values(name, parameter.shape, seed))
            parameter.set_data(FileTensor(start, parameter.dtype))  # of which each card of a plan takes its part


def initial_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Start of an adapter matrix, float32: B zero, A uniform within 1 / sqrt(in), as in MindPet's LoRADense and PEFT.

    The values depend on the name and the seed alone. MindSpore's initializers draw each card's slice by itself, so
    that a parallel plan would start from other adapters than one process.
    """
    if name.endswith(LORA_B):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng([seed, *name.encode()])
    bound = shape[1] ** -0.5
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def adapter_metadata(lora):
    """REMARKS of the section `lora` of the YAML, for ms.save_checkpoint's append_dict."""
    return dict(zip(METADATA, (int(lora["rank"]), float(lora["alpha"]))))


def adapter_pairs(stored, path):
    """The adapters in a file.

    Args:
        stored: dict, name -> StoredTensor, of an adapter file.
        path: of the file, for messages.

    Returns:
        (dict of target weight's name -> (A, B) as float32 arrays (rank, in), (out, rank), scale alpha / rank).

    Raises:
        UserError: the file holds no adapters, or not both halves of one.
    """
    names = [name.removesuffix(LORA_A) for name in stored if name.endswith(LORA_A)]
    if not names or any(remark not in stored for remark in METADATA):
        raise UserError(f"{path}: holds no adapters; a training with a `lora:` section writes them to checkpoint_network")
    lonely = [name for name in names if name + LORA_B not in stored]
    if lonely or len(names) != sum(name.endswith(LORA_B) for name in stored):
        raise UserError(f"{path}: an adapter lacks its other half; copy the file again")
    rank, alpha = (float(stored[remark].array()) for remark in METADATA)
    scale = alpha / rank
    return {f"{name}.weight": (stored[name + LORA_A].float32(), stored[name + LORA_B].float32()) for name in names}, scale


def merge_adapters(base, stored, path):
    """Full weights: base weights with adapters added.

    Args:
        base: dict, name -> StoredTensor.
        stored: the same of an adapter file.
        path: of that file, for messages.

    Returns:
        dict, name -> function that gives the float32 values of each changed weight.

    Raises:
        UserError: an adapter fits no base weight.
    """
    adapters, scale = adapter_pairs(stored, path)
    for name, (a, b) in adapters.items():
        if name not in base or tuple(base[name].shape) != (b.shape[0], a.shape[1]):
            raise UserError(f"{path}: its adapter of {name} does not fit the base weights; give the base it was trained on, "
                            "and --src_strategy with the shards of a parallel plan")
    return {name: lambda name=name, a=a, b=b: base[name].float32() + np.float32(scale) * (b @ a)
            for name, (a, b) in adapters.items()}
