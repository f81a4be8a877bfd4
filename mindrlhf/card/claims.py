"""What a card says, as claims that can be recomputed: each holds, differs, or cannot be checked."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf import cli, config
from mindrlhf.card import add, evidence, record, render
from mindrlhf.card.evidence import CURVES, HASH, METRICS
from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord
from mindrlhf.files import hash_file
from mindrlhf.inference import score_record
from mindrlhf.json_files import read_json
from mindrlhf.models.glm4 import load, sidecar
from mindrlhf.models.glm4.tokenizer import hash_vocabulary
from mindrlhf.training import identity

HOLDS, DIFFERS, UNKNOWN = "holds", "differs", "cannot be checked"
DIFFERING = "differing, "  # prefix of the settings that differ from a shipped YAML
SAME = 1e-9  # relative difference of equal numbers
# nats by which the first loss of float32 differs from ln 2 although all log-probs agree
ROUNDING = 1e-5


class Verdict(NamedTuple):
    """Whether a claim holds: HOLDS, DIFFERS or UNKNOWN, and the values or the reason."""
    state: str
    note: str


@dataclass(frozen=True)
class Claim:
    """Something that a card says.

    Attributes:
        name: of it, for the report.
        check: recomputes it.
    """
    name: str
    check: Callable[[], Verdict]


@dataclass(frozen=True)
class Places:
    """Where the files of a card are now; None: where the card says."""
    base: str | None = None
    train: str | None = None
    held_out: str | None = None
    tokenizer: str | None = None
    merged: str | None = None
    answers: str | None = None


def compare_values(said: Any, found: Any) -> Verdict:
    """A value of the card, and the one recomputed. Numbers may differ in their last digit."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool)
                  for value in (said, found))
    if said == found or (numbers and math.isclose(said, found, rel_tol=SAME, abs_tol=SAME)):
        return Verdict(HOLDS, _short(found))
    return Verdict(DIFFERS, f"the card says {_short(said)}, recomputed: {_short(found)}")


def compare_all(said: Mapping[str, Any], found: Mapping[str, Any]) -> Verdict:
    """All values of a section of the card, and those recomputed; it names each that differs."""
    both = {name: (said.get(name), found.get(name)) for name in {**said, **found}}
    differing = [f"{name}: {verdict.note}" for name, pair in both.items()
                 if (verdict := compare_values(*pair)).state == DIFFERS]
    return (Verdict(DIFFERS, "; ".join(differing)) if differing
            else Verdict(HOLDS, f"{len(both)} values"))


def _short(value: Any) -> str:
    """A value for a line: long fingerprints by their first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return f"{text[:12]}..." if len(text) in (32, 64) and text.isalnum() else text


def of_file(path: object, said: Any, read: Callable[[str], Any], hint: str) -> Verdict:
    """What a file says, if it is there.

    Args:
        path: of the file, or None.
        said: of it, in the card.
        read: recomputes that from the file.
        hint: the option that names the file if it has moved.
    """
    if not said:
        return Verdict(UNKNOWN, "the card does not have it")
    if not isinstance(path, str) or not (Path(path).is_file() or Path(path).is_dir()):
        return Verdict(UNKNOWN, f"{path}: no such file here{hint and f'; name it with {hint}'}")
    try:
        found = read(path)
    except UserError as error:  # damaged
        return Verdict(DIFFERS, str(error))
    verdict = (compare_all(said, found) if isinstance(said, dict) and isinstance(found, dict)
               else compare_values(said, found))
    return Verdict(verdict.state, f"{verdict.note} ({path})")


def find_claims(card: dict[str, Any], folder: Path, places: Places) -> Iterator[Claim]:
    """The claims of a card that files can prove.

    Args:
        card: its sections, as record.read_card() returns them.
        folder: of the card, in the folder of its run if that is still there.
        places: of files that have moved.
    """
    yield Claim(record.RECORD, lambda: _check_seal(folder / record.RECORD))
    for name, language in record.DOCUMENTS.items():
        yield Claim(name, partial(_check_document, folder / name, card.get("documents", {}),
                                  render.render_card(card, language)))
    if "curves" in card:
        yield Claim(CURVES, partial(of_file, str(folder / CURVES), card["curves"].get(HASH),
                                    hash_file, ""))
    yield from _claims_of_inputs(card, places)
    yield from _claims_of_run(card, folder.parent)
    yield from _claims_of_results(card, places)


def _check_seal(path: Path) -> Verdict:
    """Whether card.json is as it was written."""
    try:
        read_json(path)
    except UserError as error:
        return Verdict(DIFFERS, str(error))
    return Verdict(HOLDS, "as it was written")


def _check_document(path: Path, written: Mapping[str, Any], said: str) -> Verdict:
    """Whether a document is as it was written; front matter above it is not compared.

    Args:
        path: of the document.
        written: hash of each document, and of the code that wrote them.
        said: what card.json gives now. Another version of the project may give other words.
    """
    if not path.is_file():
        return Verdict(UNKNOWN, f"{path}: no such file here")
    text = path.read_bytes().decode(errors="replace")
    found = render.MARK + text.partition(render.MARK)[2]
    if found == said:
        return Verdict(HOLDS, "as card.json gives it")
    unchanged = written.get(path.name) == record.hash_text(found)
    if unchanged and written.get("code") != evidence.hash_code():
        return Verdict(HOLDS, "as it was written, by another version of this project")
    lines = zip_longest(said.split("\n"), found.split("\n"), fillvalue="")
    number, (line, other) = next((number, pair) for number, pair in enumerate(lines, 1)
                                 if pair[0] != pair[1])
    return Verdict(DIFFERS, f"line {number}: card.json gives {cli.shown(line)}, found: "
                            f"{cli.shown(other)}")


def _claims_of_inputs(card: dict[str, Any], places: Places) -> Iterator[Claim]:
    """Base weights, data, tokenizer."""
    base, tokenizer = card["base"], card["tokenizer"]
    yield Claim("base weights: fingerprint", partial(
        of_file, places.base or base.get("file"), base.get("fingerprint"),
        partial(_fingerprint_of, strategy=base.get("strategy")), "--base"))
    beside = sidecar.find_sidecar(path) if (path := places.base or base.get("file")) else None
    yield Claim("base weights: config", partial(
        of_file, str(beside or f"{path}.json"), base.get("model"), _config_in, "--base"))
    for name, option in (("train", "--train_dataset"), ("held_out", "--eval_dataset")):
        if name in card["data"]:
            data = card["data"][name]
            path = getattr(places, name) or data.get("file")
            title = {"train": "training data", "held_out": "held-out data"}[name]
            yield Claim(f"{title}: content", partial(of_file, path, data.get(HASH), _hash_data,
                                                     option))
            yield Claim(f"{title}: counts", partial(
                of_file, path, _without_file(data), partial(_counts_of, path), option))
    yield Claim("tokenizer: hash", partial(
        of_file, places.tokenizer or tokenizer.get("file"), tokenizer.get("sha256"),
        hash_vocabulary, "--tokenizer"))


def _fingerprint_of(path: str, strategy: str | None = None) -> str:
    """Fingerprint of unsharded weights."""
    if Path(path).is_dir():
        return fingerprints.fingerprint(load.open_weights(path, strategy))
    return _fingerprint_in(path)


def _fingerprint_in(path: str) -> str:
    """Fingerprint of all that a file holds, after its checksum has been compared."""
    containers.require_intact(path)
    return fingerprints.fingerprint(containers.open_tensors(path))


def _config_in(path: str) -> dict[str, Any]:
    """Sizes and constants of a model, from the sidecar of its weights."""
    return json.loads(json.dumps(asdict(sidecar.read_sidecar(path).config)))


def _hash_data(path: str) -> dict[str, Any]:
    """Content hashes of rows and index."""
    return {name: hash_file(f"{path}{end}") for name, end in mindrecord.HASHED.items()}


def _counts_of(path: str, _: str) -> dict[str, Any]:
    """What the sidecar of data says, as the card has it."""
    return _without_file(record.describe_data(path, mindrecord.read_data_sidecar(path)))


def _without_file(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of the card without the name of its file, which may have moved."""
    return {name: value for name, value in section.items() if name != "file"}


def _claims_of_run(card: dict[str, Any], output: Path) -> Iterator[Claim]:
    """Numbers of metrics.jsonl, settings, the check at step 0, and the shards."""
    path = str(output / METRICS)
    loss_type = card["settings"].get("dpo", {}).get("loss_type", "sigmoid")
    titles = {"metrics": "training metrics", "step_0": "first step", "evaluation": "evaluation"}
    for section, title in titles.items():
        if section in card:
            said = _leaves(card[section])
            yield Claim(title, partial(of_file, path, said, partial(
                _metrics_in, output, loss_type, section), ""))
    if "step_0" in card:
        yield Claim("policy = reference at step 0", partial(check_step_0, card))
    said = {"id": card["run"].get("id"), "workers": card["run"].get("workers"),
            **{f"dpo.{name}": value for name, value in card["settings"].get("dpo", {}).items()},
            **{f"{DIFFERING}{name}": value
               for name, value in card["settings"].get("values", {}).items()
               if not name.startswith("recompute_config.")}}
    yield Claim("run and settings", partial(
        of_file, str(output / identity.FILE), said, partial(_settings_in, list(said)), ""))
    yield Claim("plan", partial(of_file, str(output / identity.FILE), card["plan"], partial(
        _plan_in, card["plan"].get("device")), ""))
    for rank, fingerprint in card["result"].get("shards", {}).items():
        folder = output / "checkpoint_network" / str(rank)
        file = next(iter(sorted(folder.glob("*-network.ckpt"))), folder / "*-network.ckpt")
        yield Claim(f"result, {rank}: fingerprint", partial(
            of_file, str(file), fingerprint, _fingerprint_in, ""))


def _metrics_in(output: Path, loss_type: str, section: str, _: str) -> dict[str, Any]:
    """A section of the card, recomputed from metrics.jsonl."""
    return _leaves(evidence.read_metrics(output, loss_type)[section])


def _leaves(section: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section and of the sections in it."""
    return dict(identity.flatten(section, separator=", "))


def _settings_in(names: list[str], path: str) -> dict[str, Any]:
    """Settings in a run.json, by the names that the card has."""
    run = identity.Identity.of_json(read_json(path), path)
    return {name: run.id if name == "id" else run.values.get(name.removeprefix(DIFFERING))
            for name in names}


def _plan_in(device: Any, path: str) -> dict[str, Any]:
    """The plan in a run.json, which does not say the device."""
    values = identity.Identity.of_json(read_json(path), path).values
    settings = config.with_changes({"context": {"device_target": device}}, {
        name: value for name, value in values.items() if " " not in name and "." in name})
    return record.describe_plan(settings, values["workers"])


def check_step_0(card: dict[str, Any]) -> Verdict:
    """Whether the first loss is ln 2, as far as the difference of the log-probs allows."""
    found, dpo = card["step_0"], card["settings"].get("dpo", {})
    size, loss = found.get("logratio_size"), found.get("dpo_loss")
    allowed = dpo.get("reference_tolerance", 1.0)
    if not isinstance(size, (int, float)) or not isinstance(loss, (int, float)):
        return Verdict(UNKNOWN, "the card does not have it")
    if size > allowed:
        return Verdict(DIFFERS, f"log-probs differ by {size:.3g} nats, allowed: {allowed}")
    if "expected_loss" not in found:
        return Verdict(HOLDS, f"log-probs differ by {size:.3g} nats")
    # the loss changes by less than beta for each nat of either answer
    bound = 2 * dpo.get("beta", 0.1) * size + ROUNDING
    state = HOLDS if abs(loss - math.log(2)) <= bound else DIFFERS
    return Verdict(state, f"loss {loss:.6f}, ln 2 = {math.log(2):.6f}")


def _claims_of_results(card: dict[str, Any], places: Places) -> Iterator[Claim]:
    """The merged weights, their score, the answers."""
    merged = card["result"].get("merged")
    if merged:
        yield Claim("merged result: fingerprint", partial(
            of_file, places.merged or merged.get("file"), merged.get("fingerprint"),
            _fingerprint_in, "--checkpoint"))
    if score := card.get("score"):
        yield Claim("score", partial(
            of_file, score.get("file"), _without_file(score), _score_in, ""))
    if answers := card.get("answers"):
        yield Claim("answers before and after", partial(
            of_file, places.answers or answers.get("file"), _without_file(answers), _answers_in,
            "--answers"))


def _answers_in(path: str) -> dict[str, Any]:
    """Answers as the card has them."""
    return _without_file(add.describe_answers_of_both(path))


def _score_in(path: str) -> dict[str, Any]:
    """A score as the card has it."""
    return _without_file(record.describe_score(path, score_record.load(path)))
