"""Loads the model that answers or is scored: weights, shards or adapters, and the tokenizer."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf import cli, config
from mindrlhf.cli import UserError
from mindrlhf.inference.engine import Engine
from mindrlhf.models.glm4 import sidecar
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.parallel import Settings


class Model(NamedTuple):
    """What is known of a model before its weights are loaded.

    Attributes:
        settings: as config.load_settings returns them, of run_mode predict or score.
        tokenizer: of the model.
        adapters: LoRA adapters to add to load_checkpoint: output/checkpoint_network of their
            training, or one file; None: none.
    """
    settings: Settings
    tokenizer: Glm4Tokenizer
    adapters: str | None


def open_model(settings: Settings, adapters: str | None) -> Model:
    """Check everything that can be checked before the weights are loaded, and load the tokenizer.

    Args:
        settings: as config.load_settings returns them, of run_mode predict or score.
        adapters: as in Model.

    Raises:
        UserError: there is no tokenizer, or checkpoint and YAML do not match.
    """
    from mindrlhf import runtime
    runtime.quiet_mindformers()
    sidecar.require_same_model(settings.get("load_checkpoint"), settings)
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])
    return Model(settings, tokenizer, adapters)


def load_engine(model: Model, batch_size: int | None = None, most: int | None = None) -> Engine:
    """Load the weights.

    Args:
        model: as open_model() returns it.
        batch_size: answers that are generated at once; None: the YAML's.
        most: answers that there are; no more are generated at once. None: unknown.

    Raises:
        UserError: weights, adapters and YAML do not match.
    """
    config.require_weights(model.settings)
    strategies(model)
    with cli.quiet_stdout():
        return Engine(build_model(model), model.tokenizer, model.settings, batch_size, most)


class Strategies(NamedTuple):
    """Whose shards --src_strategy is of: those of the weights, else those of the adapters.

    Attributes:
        of_weights: for load_checkpoint, or None.
        of_adapters: for the adapters, or None.
    """
    of_weights: str | None
    of_adapters: str | None


def strategies(model: Model) -> Strategies:
    """What --src_strategy belongs to.

    Raises:
        UserError: weights and adapters both are shards.
    """
    path, given = model.settings["load_checkpoint"], model.settings.get("src_strategy") or None
    if given and model.adapters and Path(path).is_dir() and Path(model.adapters).is_dir():
        raise UserError(f"--src_strategy: {path} and {model.adapters} are both folders of shards; "
                        "merge one of them first")
    of_adapters = bool(model.adapters) and not Path(path).is_dir()
    return Strategies(None, given) if of_adapters else Strategies(given, None)


def build_model(model: Model) -> Any:
    """Build MindFormers' ChatGLM2ForConditionalGeneration and load its weights.

    Args:
        model: as open_model() returns it.

    Returns:
        the network, ready to generate.

    Raises:
        UserError: weights, adapters and YAML do not match.
    """
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build

    run_config = config.to_mindformers(model.settings)
    runtime.start_device(run_config, parallel=False)
    network = build.build_network(run_config)
    fill_network(network, model)
    return network


def fill_network(network: Any, model: Model) -> None:
    """Load the weights of a model into a network, adapters added to them.

    Args:
        network: of the model's YAML.
        model: as open_model() returns it.

    Raises:
        UserError: weights, adapters and YAML do not match.
    """
    from mindrlhf.models.glm4 import load, lora
    of_weights, of_adapters = strategies(model)
    base = load.load_weights(network, model.settings["load_checkpoint"], strategy=of_weights)
    if model.adapters:
        stored = load.open_adapters(model.adapters, of_adapters)
        load.set_values(network, lora.merge_adapters(base, stored, model.adapters))
