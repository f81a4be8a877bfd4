"""What only a CPU needs, and the table of every patch of MindFormers or MindSpore in the project.

Each entry is the full name of what is replaced, then: replacement | when | why. Patches of modules
and classes hold for the process, patches of cells for one network; `encoder` is its
network.transformer.encoder. "On a CPU" means that the YAML's device_target is CPU.

runtime.py, on every device:

    mindformers.trainer.base_trainer.pprint
        a no-op | always (quiet_mindformers) | the Trainer prints the full configuration
    mindformers.core.context.build_context.CONTEXT_INSTANCE
        None | always (start_device) | it would keep the settings of an earlier start in the process
    mindformers.trainer.base_trainer.transform_and_load_checkpoint
        load_instead | training resumes (load_states_with) | loading must be strict
    mindformers.trainer.base_trainer.load_resume_context_from_checkpoint
        load_context | training resumes (resume_after) | the saved epoch is a step in sink mode only

patches.fix_cpu, on every device, where the network needs it:

    encoder.cast
        ops.Cast | MindSpore 2.7 | MindFormers 1.3 calls nn.Cell.cast, which 2.6 is the last to have
    encoder.layers[*].self_attention.core_attention.mul_mask
        patches._FloatMaskMul | no flash attention | a uint8 mask times -10000 wraps to +240

operators.install, on a CPU, because MindSpore 2.7 has no CPU kernel:

    mindformers.modules.flash_attention.FlashAttentionScore
        attention.FlashAttentionScore | use_flash_attention
    mindspore.ops.operations.RmsNorm
        operators.RmsNorm | MindFormers chooses the fused norm
    mindspore.ops.ApplyRotaryPosEmb
        attention.ApplyRotaryPosEmb | prediction with a key-value cache
    mindspore.ops.auto_generate.ReshapeAndCache
        attention.ReshapeAndCache | prediction with a key-value cache
    mindspore.ops.auto_generate.PagedAttention
        attention.PagedAttention | prediction with a key-value cache
    mindspore.mint.argmax
        operators.argmax | greedy decoding
    mindspore.mint.topk
        operators.topk | sampling
    mindspore.mint.sort
        operators.sort | sampling
    mindspore.mint.cumsum
        operators.cumsum | sampling
    mindspore.ops.UnsortedSegmentSum
        operators.UnsortedSegmentSum | gradient of the log-probs | there is a kernel, but it ignores
        negative ids, which are an error on Ascend; the stand-in returns NaN

rules.install and sink.install, on a CPU, so that MindSpore 2.7 behaves as 2.4 does on an NPU:

    mindspore.Parameter.set_data
        rules._set_data | always | 2.4 refuses values for a parameter that awaits its parallel plan
    mindspore.nn.Cell._recompute
        rules._recompute | always | 2.4 lets recomputation be set once per cell
    mindspore.train.model.Model._train
        sink.train_in_sink_mode | always; without sink mode it runs the original | MindSpore turns
        sink mode off on a CPU. In sink mode, that model's _exec_preprocess and _train_process are
        prepare and sink of sink.py

patches.optimize_cpu, for Glm4DPO on a CPU without plan, flash attention and cache
(build.can_optimize):

    mindformers.core.optim.adamw._adamw_opt
        patches._fuse_adamw's run | always | three kernels instead of a dozen, and less memory
    mindformers.core.clip_grad.get_square_sum
        patches._square_by_rows' run | always | a tenth of the time
    encoder.layers[*].input_layernorm, .post_attention_layernorm, encoder.final_layernorm
        cells.RMSNorm | compute_dtype and rotary_dtype float32 | faster, less memory, same result
    encoder.layers[*].self_attention
        cells.SelfAttention | the same | the same
    network.rotary, Glm4DPO's own
        cells.Rotation | the same | its tables are what cells.SelfAttention takes
    encoder.layers[*].self_attention.query_key_value.bias_add
        ops.BiasAdd | the same | the same
    encoder.layers[*].mlp.activation_func
        cells.SwiGLU | the same | the same
"""
