"""The card of a run as the model card of its Hugging Face folder."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mindrlhf.card import evidence, record, render
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import sidecar

# rope_ratio of GLM-4-9B -> name of its repository
MODELS = {1: "glm-4-9b", 500: "glm-4-9b-chat", 10000: "glm-4-9b-chat-1m"}
SIZES_9B = {"num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696,
            "padded_vocab_size": 151552}
OWNER = "THUDM"
# a repository in Hugging Face's cache: models--OWNER--NAME
CACHED = re.compile(r"(models|datasets)--([\w.-]+?)--([\w.-]+)")


def find_documents(source: str, given: str | None) -> tuple[dict[str, bytes], str]:
    """The files of the card that belongs to a checkpoint, for its Hugging Face folder.

    Args:
        source: the checkpoint.
        given: --card: the folder of the card; None: the one beside the checkpoint or its run.

    Returns:
        file name -> content, empty if there is no card, and a remark for the user or "".

    Raises:
        UserError: the given card is no card, or describes other weights.
    """
    if given:
        folder = record.find_folder(given)
        card = record.read_card(folder)
        if problem := _problem(card, source):
            raise UserError(f"{folder}: {problem}")
        return _documents(folder, card), f"card of {folder}"
    about = evidence.read_optional(sidecar.path_beside(source))
    origin = about.get("source")
    places = [Path(source).parent, *([Path(origin).parent] if isinstance(origin, str) else [])]
    found = [place / record.FOLDER for place in places
             if (place / record.FOLDER / record.RECORD).is_file()]
    if not found:
        return {}, ""
    folder = found[0]
    try:
        card = record.read_card(folder)
        problem = _problem(card, source)
        return ({}, f"no model card: {folder}: {problem}") if problem else (
            _documents(folder, card), f"card of {folder}")
    except UserError as error:
        return {}, f"no model card: {error}"


def _problem(card: Mapping[str, Any], source: str) -> str | None:
    """Why a card is not that of a checkpoint, or None if it is."""
    from mindrlhf.checkpoints import containers, fingerprints
    about = evidence.read_optional(sidecar.path_beside(source))
    identity = about.get("fingerprint") or fingerprints.fingerprint(containers.open_tensors(source))
    result = card["result"]
    merged = result.get("merged", {}).get("fingerprint")
    if identity in (merged, *result.get("shards", {}).values()):
        return None
    cure = f"add them with: python -m mindrlhf.card add FOLDER --checkpoint {source}"
    return (f"describes other weights than {source}; {cure}" if merged else
            f"does not know the merged weights {source} yet; {cure}")


def _documents(folder: Path, card: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a card; README.md has the front matter that Hugging Face reads."""
    with record.one_line(folder / record.RECORD):
        texts = {name: render.render_card(card, language)
                 for name, language in record.DOCUMENTS.items()}
        texts["README.md"] = f"{front_matter(card)}\n{texts['README.md']}"
    found = {name: text.encode() for name, text in texts.items()}
    for name in (record.RECORD, evidence.CURVES):
        if (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    return found


def front_matter(card: Mapping[str, Any]) -> str:
    """The YAML at the beginning of a model card, with --- above and below."""
    base = base_model(card["base"])
    fields: dict[str, Any] = {"language": ["zh", "en"]}
    name = base.partition("/")[2].removesuffix("-hf") if base else None
    if name in MODELS.values():
        fields |= {"license": "other", "license_name": "glm-4",
                   "license_link": f"https://huggingface.co/{OWNER}/{name}/blob/main/LICENSE"}
    if base:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    names = [_cached(source.get("file"), "datasets") for data in card["data"].values()
             for source in data.get("source", [])]
    if any(names):
        fields["datasets"] = sorted({name for name in names if name})
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation",
               "tags": ["glm", "dpo", "preference-optimization", "mindspore"]}
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)}---\n"


def base_model(base: Mapping[str, Any]) -> str | None:
    """The repository of the base weights: that of the cache they are from, or of these sizes."""
    if name := _cached(base.get("source"), "models"):
        return name
    sizes = base.get("model") or {}
    if any(sizes.get(name) != size for name, size in SIZES_9B.items()):
        return None
    model = MODELS.get(sizes.get("rope_ratio", 0))
    suffix = "-hf" if base.get("layout") == "glm" else ""
    return f"{OWNER}/{model}{suffix}" if model else None


def _cached(path: object, kind: str) -> str | None:
    """OWNER/NAME of the repository in whose cache a path is, or None."""
    match = CACHED.search(path) if isinstance(path, str) else None
    return f"{match[2]}/{match[3]}" if match and match[1] == kind else None
