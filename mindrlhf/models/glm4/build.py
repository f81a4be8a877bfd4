"""GLM-4's network: MindFormers builds it from the YAML; patches and LoRA adapters are added."""
from __future__ import annotations

from typing import Any

from mindformers.core.parallel_config import build_parallel_config
from mindformers.models.build_model import build_network as build_by_mindformers
from mindspore import nn

from mindrlhf import runtime
from mindrlhf.cpu import patches
from mindrlhf.models.glm4 import lora, network
from mindrlhf.parallel import Plan


def build_network(run_config: Any) -> nn.Cell:
    """Build the network that the YAML names.

    Args:
        run_config: MindFormerConfig, after runtime.start().

    Returns:
        the network with random weights; load.load_weights() sets the real ones.
    """
    plan = Plan.of(run_config)  # before MindFormers makes an object of parallel_config
    build_parallel_config(run_config)
    model = build_by_mindformers(run_config.model, default_args={
        "parallel_config": run_config.parallel_config, "plan": plan,
        "dpo": run_config.dpo, "lora": run_config.lora})
    patches.fix_cpu(model)
    if isinstance(model, network.Glm4DPO) and can_optimize(run_config.model.model_config):
        patches.optimize_cpu(model, run_config.model.model_config)
    if run_config.lora:
        compute_dtype = run_config.model.model_config.compute_dtype
        lora.add_adapters(model, run_config.lora, compute_dtype=compute_dtype,
                          seed=run_config.seed)
    return model


def can_optimize(config: Any) -> bool:
    """Whether fast CPU cells may replace those of Glm4DPO: on a CPU, without a parallel plan.

    With flash attention or a key-value cache, MindFormers' cells stay, so that an NPU's network
    runs on a CPU.

    Args:
        config: the model_config section.
    """
    npu_only = config.use_flash_attention or config.use_past
    return runtime.is_cpu() and not runtime.is_sharded() and not npu_only
