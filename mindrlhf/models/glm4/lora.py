"""LoRA: small adapters beside frozen weights (arXiv:2106.09685), W x + alpha / rank * B (A x).

The cells are MindFormers'. An adapter file holds A and B of every adapted matrix, and alpha and rank, so it says by itself
how it is merged. Without adapters the network is the reference, so preprocessed data serve LoRA and full training alike.
"""
import numpy as np

from mindrlhf.cli import UserError

TARGETS = {"qkv": "query_key_value", "dense": "dense", "mlp": "dense_h_to_4h|dense_4h_to_h"}
A, B = ".mindpet_delta_lora_a", ".mindpet_delta_lora_b"


def is_adapter(name):
    """Whether a parameter belongs to an adapter."""
    return name.endswith((A, B))


def is_base(name):
    """Whether a parameter is one of the weights without adapters."""
    return name.startswith("transformer.") and not is_adapter(name)


def add_adapters(network, lora):
    """Put an adapter beside each target matrix and freeze all else.

    Args:
        network: a ChatGLM2 network, changed in place. B starts at zero, so what it computes does not change.
        lora: the section `lora` of the YAML: rank, alpha, dropout, target_modules.
    """
    from mindformers.pet.pet_config import LoraConfig
    from mindformers.pet.tuners.lora_adapter import LoraAdapter
    pattern = "|".join(TARGETS[target] for target in lora["target_modules"])
    LoraAdapter.get_pet_model(network.transformer.encoder, LoraConfig(
        lora_rank=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=f"({pattern})$"))
    for name, parameter in network.parameters_and_names():
        parameter.requires_grad = is_adapter(name)
        if is_adapter(name):
            parameter.name = name  # MindFormers names it within its cell only


def remarks(lora):
    """What an adapter file says of itself, for ms.save_checkpoint's append_dict."""
    return {"lora_rank": int(lora["rank"]), "lora_alpha": float(lora["alpha"])}


def pairs(stored, path):
    """The adapters in a file.

    Args:
        stored: dict, name -> StoredTensor, of an adapter file.
        path: of the file, for messages.

    Returns:
        (dict of target weight's name -> (A, B) as float32 arrays (rank, in), (out, rank), scale alpha / rank).

    Raises:
        UserError: the file holds no adapters, or not both halves of one.
    """
    names = [name.removesuffix(A) for name in stored if name.endswith(A)]
    if not names or "lora_rank" not in stored or "lora_alpha" not in stored:
        raise UserError(f"{path}: holds no adapters; a training with a `lora:` section writes them to checkpoint_network")
    lonely = [name for name in names if name + B not in stored]
    if lonely or len(names) != sum(name.endswith(B) for name in stored):
        raise UserError(f"{path}: an adapter lacks its other half; copy the file again")
    scale = float(stored["lora_alpha"].array()) / int(stored["lora_rank"].array())
    return {f"{name}.weight": (stored[name + A].float32(), stored[name + B].float32()) for name in names}, scale


def merged(base, stored, path):
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
    adapters, scale = pairs(stored, path)
    for name, (a, b) in adapters.items():
        if name not in base or tuple(base[name].shape) != (b.shape[0], a.shape[1]):
            raise UserError(f"{path}: its adapter of {name} does not fit the base weights; give the base it was trained on")
    return {name: lambda name=name, a=a, b=b: base[name].float32() + np.float32(scale) * (b @ a)
            for name, (a, b) in adapters.items()}
