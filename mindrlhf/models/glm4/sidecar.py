"""The sidecar of a checkpoint: `glm4_9b.ckpt.json` beside `glm4_9b.ckpt` says what no tensor says.

A wrong rope_ratio or epsilon ruins a run without any error. So the numbers of config.json travel with the
weights, and each command compares them with its YAML. Training leaves them in output/model.json for what is
merged later.
"""
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from mindrlhf import cli
from mindrlhf.checkpoints.containers import open_tensors
from mindrlhf.checkpoints.fingerprints import fingerprint as fingerprint_of
from mindrlhf.cli import UserError
from mindrlhf.files import read_json, write_json
from mindrlhf.models.glm4 import model_config, weight_names

MODEL = "model.json"  # in the output folder of a training run
IN_YAML = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_attention_heads",
           "multi_query_group_num", "kv_channels", "layernorm_epsilon", "rope_ratio")
UNCHECKED = "rope_ratio, layernorm_epsilon, the size of a head and the stop tokens are not checked"


def path_beside(checkpoint):
    """Where the sidecar of a checkpoint lies."""
    return Path(f"{checkpoint}.json")


def find_sidecar(checkpoint):
    """The sidecar of a checkpoint; for the shards of several cards, a folder or a file of one, that of their run."""
    path = Path(checkpoint).absolute()
    if path.is_dir() or not path.suffix:
        places = [path / MODEL, path.parent / MODEL]
    elif _of_a_rank(path):
        places = [path_beside(checkpoint), path.parents[1] / MODEL, path.parents[2] / MODEL]
    else:
        places = [path_beside(checkpoint)]
    return next((place for place in places if place.is_file()), None)


def _of_a_rank(checkpoint):
    """Whether a file may hold one card's share of the weights: those go into rank_* folders."""
    return re.fullmatch(r"rank_\d+", Path(checkpoint).absolute().parent.name) is not None


def _name_for(checkpoint):
    return MODEL if Path(checkpoint).is_dir() else path_beside(checkpoint).name


def write_sidecar(checkpoint, numbers, *, dtype, fingerprint, source, **about):
    """Write the sidecar of a checkpoint that is there.

    Args:
        checkpoint: path of the file.
        numbers: Numbers.
        dtype, fingerprint: of the file.
        source: what it was made from; about: more of that.
    """
    write_json(path_beside(checkpoint), {
        "numbers": asdict(numbers), "dtype": dtype, "source": str(source), **about,
        "fingerprint": fingerprint, "sample_fingerprint": sample_fingerprint(checkpoint)})


def remove_sidecar(checkpoint):
    """Remove the sidecar of a checkpoint that is about to be another.

    Raises:
        UserError: there is one, and it cannot be removed.
    """
    try:
        path_beside(checkpoint).unlink(missing_ok=True)
    except NotADirectoryError:  # then there is no checkpoint either
        pass
    except OSError as error:
        raise UserError(f"{path_beside(checkpoint)}: cannot be removed ({error.strerror}); give another path") from None


def sample_fingerprint(checkpoint):
    """Enough of a checkpoint's identity to tell it from others, in a moment."""
    return fingerprint_of(open_tensors(checkpoint), sample=True)


def read_sidecar(path):
    """(Numbers, dict of the rest) of a sidecar.

    Raises:
        UserError: it is none.
    """
    content = read_json(path)
    values = content.pop("numbers", None)
    names = [field.name for field in fields(model_config.ModelConfig)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise UserError(f"{path}: no sidecar of a checkpoint; remove it, or convert the weights again")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    odd = [f"{name} is {value!r}" for name, value in values.items() if not model_config.is_valid(name, value)]
    if odd:
        raise UserError(f"{path}: {', '.join(odd)}; remove it, or convert the weights again")
    return model_config.ModelConfig(**values), content


def read_config_of(checkpoint):
    """(Numbers, path of the sidecar) that hold for a checkpoint; (None, None) where nothing says so.

    Raises:
        UserError: there is a sidecar, but of another checkpoint.
    """
    path = find_sidecar(checkpoint)
    if path is None:
        return None, None
    numbers, about = read_sidecar(path)
    if about.get("sample_fingerprint") and about["sample_fingerprint"] != sample_fingerprint(checkpoint):
        raise UserError(f"{path}: describes another checkpoint than the one beside it; fetch or convert both "
                        "again, or remove it if you know that the numbers in the YAML are right")
    return numbers, path


def compare_fields(first, second):
    """What differs in two dicts: dict, name -> (value in first, value in second), for the names in second."""
    return {name: (first.get(name), second[name]) for name in second if first.get(name) != second[name]}


def require_same_model(checkpoint, settings):
    """Refuse a checkpoint whose numbers are not those of the YAML; warn of what cannot be compared.

    Args:
        checkpoint: path of the file, or of the folder of shards, as load_checkpoint gives it; None is left to the loader.
        settings: of config.load().

    Raises:
        UserError: with every difference.
    """
    if not checkpoint:
        return
    model = settings["model"]["model_config"]
    numbers, source = read_config_of(checkpoint)
    yaml = {name: model.get(name, "not set") for name in IN_YAML}
    if numbers:
        numbers = {name: getattr(numbers, name) for name in IN_YAML}
    else:
        sharded = _of_a_rank(checkpoint) or Path(checkpoint).is_dir()
        shapes = {} if sharded else {name: t.shape for name, t in open_tensors(checkpoint).items()}
        source, numbers = checkpoint, weight_names.measure_shapes(shapes)
        yaml |= {f"{name} * kv_channels": model.get(name, 0) * model.get("kv_channels", 0)
                 for name in ("num_attention_heads", "multi_query_group_num")}
        if cli.rank() == 0:
            stream = sys.stderr if settings["run_mode"] == "predict" else sys.stdout  # there the answer goes
            print(f"warning: {checkpoint}: has no {_name_for(checkpoint)} beside it, so {UNCHECKED}; "
                  "convert_weight.py writes one", file=stream, flush=True)
    wrong = compare_fields(yaml, numbers)
    if wrong:
        raise UserError(f"{source}: the YAML is not for this checkpoint: " + "; ".join(
            f"{name} is {ours} in the YAML, {theirs} in the checkpoint"
            for name, (ours, theirs) in wrong.items()))


def copy_to_run(checkpoint, output_dir):
    """Leave the numbers of the checkpoint that a run starts from in its output folder. Rank 0 writes."""
    if cli.rank():
        return
    target, sidecar = Path(output_dir) / MODEL, find_sidecar(checkpoint)
    if sidecar is None:
        target.unlink(missing_ok=True)  # of an earlier run
    elif sidecar.resolve() != target.resolve():
        numbers, about = read_sidecar(sidecar)
        write_json(target, {"numbers": asdict(numbers), "source": str(checkpoint),
                            "source_fingerprint": about.get("fingerprint")})


def copy_to_result(source, target, *, dtype, fingerprint):
    """Write the sidecar of a checkpoint that was merged or shared out.

    Args:
        source: what it was made from: a file, or the checkpoint or checkpoint_network folder of a run.
        target: path of the new file, or of the folder of the new shards.
        dtype, fingerprint: of the new weights as a whole.

    Returns:
        whether there was anything to carry.
    """
    described = find_sidecar(source)
    if Path(target).is_dir():
        if described:
            write_json(Path(target) / MODEL, {"numbers": asdict(read_sidecar(described)[0]), "source": str(source),
                                              "source_fingerprint": fingerprint})
    elif described:
        write_sidecar(target, read_sidecar(described)[0], dtype=dtype, fingerprint=fingerprint, source=source)
    else:
        remove_sidecar(target)
    return described is not None
