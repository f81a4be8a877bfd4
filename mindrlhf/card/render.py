"""card.json as Markdown, in each language. Every value is quoted, so that no text of a file is
Markdown or HTML.
"""
from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from mindrlhf.card.phrases import phrase_in
from mindrlhf.markdown import as_table, code_span, fenced

MARK = "<!-- written by mindrlhf.card from card.json -->"  # of documents that may be replaced
Card = Mapping[str, Any]
Words = Callable[..., str]  # phrase_in() in one language
SHOWN_ANSWER = 500  # characters of an answer in a document; card.json has all
NO_VALUE = "–"


def render_card(card: Card, language: str) -> str:
    """The document of a card. Sections without data are left out.

    Args:
        card: the sections of card.json.
        language: of phrases.LANGUAGES.
    """
    words = partial(phrase_in, language)
    parts = [MARK, f"# {words('title')}", words("other_language"), _intro(card, words)]
    for title, render in RENDERERS.items():
        if body := "\n\n".join(render(card, words)):
            parts += [f"## {_title(title, card, words)}", body]
    return "\n\n".join(parts) + "\n"


def _title(key: str, card: Card, words: Words) -> str:
    """The title of a section."""
    return words(key, like=_like(card, words)) if key == "settings" else words(key)


def _like(card: Card, words: Words) -> str:
    """The YAML that the settings are compared with."""
    like = card["settings"].get("like")
    return code_span(like) if like else words("no_shipped")


def quoted(value: Any, words: Words) -> str:
    """A value of any type as Markdown: numbers as they are read, all else as code."""
    if value is None:
        return words("not_set")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return code_span(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def number(value: Any, spec: str) -> str:
    """A number with a format; – where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NO_VALUE
    return format(value, spec)


def duration(seconds: Any, words: Words) -> str:
    """Seconds as hours, or as minutes below an hour."""
    if not isinstance(seconds, (int, float)):
        return NO_VALUE
    if seconds < 3600:
        return words("minutes", value=number(seconds / 60, ".1f"))
    return words("hours", value=number(seconds / 3600, ".2f"))


def _intro(card: Card, words: Words) -> str:
    """The first paragraph."""
    run, metrics = card["run"], card["metrics"]
    return words("intro", id=code_span(run.get("id")), steps=number(metrics.get("steps"), ","),
                 pairs=number(card["data"]["train"]["pairs"], ","),
                 hours=duration(metrics.get("seconds"), words),
                 workers=number(run.get("workers"), "d"), device=code_span(card["plan"]["device"]))


def _fingerprints(card: Card, words: Words) -> Iterator[str]:
    """Files and what identifies their content."""
    base, result, tokenizer = card["base"], card["result"], card["tokenizer"]
    found = [(words("base"), base.get("file"), base.get("fingerprint"))]
    for name, data in card["data"].items():
        found.append((words(name), data["file"], data.get("xxh3_128", {}).get("rows")))
    found.append((words("tokenizer"), tokenizer.get("file"), tokenizer.get("sha256")))
    merged, shards = result.get("merged"), result.get("shards", {})
    if merged:
        found.append((words("merged"), merged.get("file"), merged.get("fingerprint")))
    else:
        found += [(words("shard", rank=code_span(rank)), None, identity)
                  for rank, identity in shards.items()]
    yield as_table([words("item"), words("file"), words("fingerprint")], [
        [title, code_span(file) if file else NO_VALUE,
         code_span(identity) if identity else words("not_known")]
        for title, file, identity in found])


def _data(card: Card, words: Words) -> Iterator[str]:
    """Counts of the data, one column for each file."""
    data = card["data"]
    names = ("pairs", "prompts", "answers", "rows", "tokens", "dataset_type", "template")
    rows = [[words(name), *(quoted(each.get(name), words) for each in data.values())]
            for name in names]
    dropped = [", ".join(f"{quoted(count, words)} x {code_span(why)}"
                         for why, count in each.get("dropped", {}).items())
               for each in data.values()]
    if any(dropped):
        rows.append([words("dropped"), *(text or "0" for text in dropped)])
    rows.append([words("source"), *(", ".join(code_span(source["file"])
                                              for source in each.get("source", []))
                                    for each in data.values())])
    yield as_table([words("item"), *(words(name) for name in data)], rows)


def _training(card: Card, words: Words) -> Iterator[str]:
    """The plan, and the training steps in numbers."""
    plan, metrics = card["plan"], card["metrics"]
    split = words("plan_value", data=number(plan.get("data_parallel"), "d"),
                  model=number(plan.get("model_parallel"), "d"))
    seconds, workers = metrics.get("seconds"), card["run"].get("workers")
    rows = {
        "plan": split + (words("optimizer_sharded") if plan.get("optimizer_sharded") else ""),
        **{name: quoted(plan[name], words) for name in
           ("rows_per_step", "seq_length", "compute_dtype") if name in plan}}
    if "lora" in plan:
        rows["lora"] = ", ".join(f"{code_span(name)} {quoted(value, words)}"
                                 for name, value in plan["lora"].items())
    rows |= {"hours_spent": duration(seconds, words),
             "card_hours": duration(seconds * workers if seconds else None, words),
             "trained_pairs": number(metrics.get("pairs"), ","),
             "trained_tokens": number(metrics.get("tokens"), ","),
             "pairs_per_second": number(metrics.get("pairs_per_second"), ",.2f"),
             "tokens_per_second": number(metrics.get("tokens_per_second"), ",.0f")}
    rows |= {"mfu": number(metrics["mfu"], ".1%")} if "mfu" in metrics else {}
    rows |= ({"memory_gb": f"{number(metrics['memory_gb'], '.1f')} GB"}
             if "memory_gb" in metrics else {})
    rows |= ({"skipped_steps": number(metrics["skipped_steps"], "d")}
             if metrics.get("skipped_steps") else {})
    lines = [[words(name), value] for name, value in rows.items()]
    lines += [[words("last_step", name=name), number(metrics[name], ".4f")]
              for name in ("loss", "rewards/accuracies", "rewards/margins") if name in metrics]
    yield as_table([words("item"), words("value")], lines)


def _settings(card: Card, words: Words) -> Iterator[str]:
    """Settings that differ from a shipped YAML."""
    values = card["settings"].get("values", {})
    if not values:
        yield words("same_settings", like=_like(card, words))
        return
    yield as_table([words("setting"), words("value")], [
        [code_span(name), quoted(value, words)] for name, value in values.items()])


def _step_0(card: Card, words: Words) -> Iterator[str]:
    """Whether policy and reference were the same."""
    found = card.get("step_0")
    if not found:
        return
    lines = [words("step_0_size", size=number(found.get("logratio_size"), ".2g"))]
    if "expected_loss" in found:
        lines.insert(0, words("step_0_loss", loss=number(found.get("dpo_loss"), ".6f"),
                              expected=number(found["expected_loss"], ".6f")))
    yield " ".join(lines)


def _curves(card: Card, words: Words) -> Iterator[str]:
    """The picture."""
    if card.get("curves"):
        yield f"![{words('curves')}](curves.png)"


def _evaluation(card: Card, words: Words) -> Iterator[str]:
    """Held-out pairs before and after training."""
    found = card.get("evaluation")
    if not found:
        return
    before, after = found["before"], found["after"]
    yield words("evaluated", pairs=number(after.get("pairs"), ","))
    names = [name for name in after if name not in ("step", "pairs")]
    yield as_table([words("metric"), words("before"),
                 words("after", step=number(after.get("step"), ","))], [
        [code_span(name), number(before.get(name), ".4f"), number(after[name], ".4f")]
        for name in names])


def _score(card: Card, words: Words) -> Iterator[str]:
    """Accuracy of the result on pairs, and by type."""
    found = card.get("score")
    if not found:
        return
    all_pairs = found["accuracy"]
    yield words(
        "score_intro", data=code_span(found["data"].get("file")),
        accuracy=number(all_pairs["value"], ".1%"), low=number(all_pairs["low"], ".1%"),
        high=number(all_pairs["high"], ".1%"),
        **{name: number(all_pairs[name], ",") for name in ("pairs", "prompts", "ties")})
    for name, slices in found.get("slices", {}).items():
        yield as_table([words("by", name=code_span(name)), words("pairs"), words("accuracy"),
                     words("interval"), words("margin")],
                    [_slice_row(each["name"], each["accuracy"], each["margin"]) for each in slices])


def _slice_row(name: str, accuracy: Card, margin: Card) -> list[str]:
    """A slice of the scored pairs as a row."""
    low, high = (number(accuracy[end], ".1%") for end in ("low", "high"))
    return [code_span(name), number(accuracy["pairs"], ","), number(accuracy["value"], ".1%"),
            f"{low} – {high}", number(margin["value"], "+.3f")]


def _answers(card: Card, words: Words) -> Iterator[str]:
    """Some answers before and after training, as code, so that their text is text."""
    found = card.get("answers")
    if not found:
        return
    shown = found["shown"]
    yield words("answers_intro", shown=number(len(shown), "d"), all=number(found["all"], ","),
                differ=number(found["differ"], ","))
    roles = {name: words(f"role_{name}") for name in ("system", "user", "assistant")}
    for entry in shown:
        texts = [(roles.get(message["role"]) or code_span(message["role"]), message["content"])
                 for message in entry["messages"]]
        texts += [(words(f"answer_{when}"), entry[when]) for when in ("before", "after")]
        yield "\n\n".join(f"**{title}**\n\n{fenced(_cut(text))}" for title, text in texts)


def _cut(text: str) -> str:
    """A text without its end, if it is long."""
    return text if len(text) <= SHOWN_ANSWER else f"{text[:SHOWN_ANSWER]} ..."


def _versions(card: Card, words: Words) -> Iterator[str]:
    """Versions of the software."""
    found = card.get("versions")
    if found:
        titles = {name: words(name) for name in ("commit", "code")}
        yield as_table([words("name"), words("value")], [
            [titles.get(name) or code_span(name), code_span(value)]
            for name, value in found.items()])


def _commands(card: Card, words: Words) -> Iterator[str]:
    """The commands of the run, and the one that verifies the card."""
    if card.get("commands"):
        yield words("commands_intro")
        yield fenced("\n".join(command.replace("\n", " ") for command in card["commands"]), "sh")
    yield words("verify")
    yield fenced(shlex.join(["python", "-m", "mindrlhf.card", "verify", "FOLDER"]), "sh")


# title of a section -> its text; in the order of the document
RENDERERS: dict[str, Callable[[Card, Words], Iterator[str]]] = {
    "fingerprints": _fingerprints, "data": _data, "training": _training, "settings": _settings,
    "step_0": _step_0, "curves": _curves, "evaluation": _evaluation, "score": _score,
    "answers_title": _answers, "versions": _versions, "commands": _commands}
