"""Answers of a trained model, from MindFormers' text generation."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from mindrlhf import cli, config
from mindrlhf.cli import UserError
from mindrlhf.config import Settings
from mindrlhf.models.glm4 import sidecar, template


def predict(settings: Settings, text: str | None, adapters: str | None = None) -> str:
    """The model's answer to one message.

    Args:
        settings: as config.load_settings returns them, of run_mode predict.
        text: the user's message.
        adapters: LoRA adapters to add to the weights: output/checkpoint_network of their training,
            or one file.

    Returns:
        the answer without special tokens.

    Raises:
        UserError: there is no text or no tokenizer, the text is too long, or weights, adapters and
            YAML do not match.
    """
    from mindrlhf import runtime
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    if text is None:
        raise UserError("run_mode predict needs --predict_data TEXT")
    runtime.quiet_mindformers()
    sidecar.require_same_model(settings.get("load_checkpoint"), settings)
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    model_config = settings["model"]["model_config"]
    tokenizer.check_vocabulary(model_config["padded_vocab_size"])
    prompt = template.prompt_ids(tokenizer, [("user", text)])
    room = model_config["seq_length"] - len(prompt)
    if room < 1:
        raise UserError(f"--predict_data is {len(prompt)} tokens with the chat template, which "
                        f"fills seq_length {model_config['seq_length']}; shorten it")
    config.require_weights(settings)
    _check_strategy(settings, adapters)
    with cli.quiet_stdout():
        model = load_model(settings, adapters)
        output = model.generate(
            [prompt], max_new_tokens=min(longest_answer(model_config, len(prompt)), room),
            eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id)[0]
    return tokenizer.decode(output[len(prompt):]).strip()


def longest_answer(model_config: Settings, prompt: int) -> int:
    """Most tokens of an answer, by the settings.

    Args:
        model_config: the section; max_decode_length and max_new_tokens limit the answer, max_length
            the prompt and the answer together.
        prompt: tokens of the prompt.
    """
    limits = [model_config.get(key) for key in ("max_decode_length", "max_new_tokens")]
    limits.append(max(model_config["max_length"] - prompt, 1) if "max_length" in model_config
                  else None)
    return min((limit for limit in limits if limit), default=512)


def _check_strategy(settings: Settings, adapters: str | None) -> None:
    """Raise UserError if --src_strategy is ambiguous: weights and adapters both are shards."""
    path = settings["load_checkpoint"]
    both = adapters and Path(path).is_dir() and Path(adapters).is_dir()
    if settings.get("src_strategy") and both:
        raise UserError(f"--src_strategy: {path} and {adapters} are both folders of shards; merge "
                        "one of them first")


def load_model(settings: Settings, adapters: str | None) -> Any:
    """Build MindFormers' ChatGLM2ForConditionalGeneration and load its weights.

    Args:
        settings: as config.load_settings returns them, of run_mode predict.
        adapters: LoRA adapters to add to the weights, as in predict().

    Returns:
        the network, ready to generate.

    Raises:
        UserError: weights, adapters and YAML do not match.
    """
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build, load, lora

    path, strategy = settings["load_checkpoint"], settings.get("src_strategy")
    # --src_strategy is that of the sharded one: the weights, else the adapters
    of_adapters = bool(adapters) and not Path(path).is_dir()
    run_config = config.to_mindformers(settings)
    runtime.start_device(run_config, parallel=False)
    model = build.build_network(run_config)
    base = load.load_weights(model, path, strategy=None if of_adapters else strategy)
    if adapters:
        stored = load.open_adapters(adapters, strategy if of_adapters else None)
        load.set_values(model, lora.merge_adapters(base, stored, adapters))
    return model
