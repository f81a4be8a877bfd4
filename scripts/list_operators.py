"""List the operators in the graphs of the 9B YAMLs, with what docs/operators.md says.

    python scripts/list_operators.py          # print differences from the document; status 1 if any
    python scripts/list_operators.py --write  # update its columns "graphs" and "types seen"

MindSpore's front end compiles here as on an NPU: target Ascend, bfloat16, the NPU's operators, and
the parallel plan, as its rank 0. It needs no NPU, because it writes the graph to a file before it
asks for the device; the error that follows is expected. Only the sizes differ from the YAMLs.
Facts about an operator are in the document only; a new one gets "unclear: not looked up". Needs g++
and MindSpore 2.7 (for scripts/rig), and about a minute.
"""
from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/operators.md"
sys.path.insert(0, str(ROOT))

from mindrlhf import cli, config  # noqa: E402
from mindrlhf.parallel import Plan  # noqa: E402
from mindrlhf.records import COLUMNS, INPUTS  # noqa: E402


class Graph(NamedTuple):
    """A YAML that a graph is compiled from, and its run_mode."""
    yaml: str
    mode: str


GRAPHS = {
    "train": Graph("finetune_glm4_9b.yaml", "finetune"),
    "lora": Graph("finetune_glm4_9b_lora.yaml", "finetune"),
    "evaluation": Graph("finetune_glm4_9b.yaml", "finetune"),
    "reference": Graph("process_glm4_9b.yaml", "preprocess"),
    "prefill": Graph("predict_glm4_9b.yaml", "predict"),
    "increment": Graph("predict_glm4_9b.yaml", "predict"),
    "token": Graph("predict_glm4_9b.yaml", "predict")}
LENGTH, PAIRS = 128, 8  # positions and pairs of a row
VOCABULARY = 528
SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "seq_length": LENGTH,
         "padded_vocab_size": VOCABULARY}
CHUNKS = 4  # into which the log-probs are split
# nodes that connect operators; they run nothing on a device
STRUCTURE = {"Depend", "Load", "MakeTuple", "Partial", "Return", "Switch", "SwitchLayer",
             "TupleGetItem", "UpdateState"}
NODE = re.compile(r"^ +(?:%\d+\([^)]*\) = )?(?:PrimFunc_)?([A-Za-z_]\w*)\(")
TENSOR = re.compile(r"Tensor\[(\w+)\](?:\*(\d+))?")

HEADINGS = ("operator", "graphs", "types seen", "Ascend in 2.4.10", "documented types", "source")
HEAD = f"| {' | '.join(HEADINGS)} |"
STATES = ("unsupported", "unclear", "supported")  # in the order of the document
UNKNOWN = "unclear: not looked up"


@dataclass(frozen=True)
class Row:
    """An operator's line of the document; the fields are its columns."""
    operator: str
    graphs: tuple[str, ...]
    types: tuple[str, ...]
    ascend: str = UNKNOWN
    documented: str = "-"
    source: str = "-"

    def cells(self) -> tuple[str, ...]:
        """Texts of the line's cells."""
        return (self.operator, ", ".join(self.graphs), "; ".join(self.types), self.ascend,
                self.documented, self.source)

    @property
    def state(self) -> str:
        """One of STATES."""
        return self.ascend.split(":")[0]


@dataclass
class Use:
    """The graphs that use an operator, and its types: "inputs -> outputs", each type once."""
    graphs: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)


def kinds(text: str) -> str:
    """Types of the tensors in a piece of a graph's line: "bfloat16, uint8", or "-" for none."""
    return ", ".join(dict.fromkeys(found[0].lower() for found in TENSOR.findall(text))) or "-"


def read_graph(text: str) -> Iterable[tuple[str, str]]:
    """(operator, types) of each node in a graph. MindSpore writes types in the line after it."""
    lines = text.splitlines()
    for line, below in zip(lines, lines[1:]):
        node = NODE.match(line)
        if node and node[1] not in STRUCTURE and below.lstrip().startswith(": ("):
            inputs, _, outputs = below.partition(") -> (")
            yield node[1], f"{kinds(inputs)} -> {kinds(outputs)}"


def read_document(text: str) -> list[Row]:
    """Rows of the document's table.

    Raises:
        UserError: a row has another number of cells, or an unknown state in the column for Ascend.
    """
    lines = text.splitlines()
    rows = []
    for line in lines[lines.index(HEAD) + 2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if len(cells) != len(HEADINGS) or cells[3].split(":")[0] not in STATES:
            raise cli.UserError(f"{DOCUMENT}: {len(HEADINGS)} cells expected, the fourth with "
                                f"{', '.join(STATES)}: {line}")
        graphs, types = tuple(cells[1].split(", ")), tuple(cells[2].split("; "))
        rows.append(Row(cells[0], graphs, types, *cells[3:]))
    return rows


def merge(known: Iterable[Row], seen: dict[str, Use]) -> list[Row]:
    """A row for each operator seen, with the facts that are known, in the order of the document."""
    facts = {row.operator: row for row in known}
    rows = [replace(facts.get(name, Row(name, (), ())),
                    graphs=tuple(graph for graph in GRAPHS if graph in use.graphs),
                    types=tuple(sorted(use.types))) for name, use in seen.items()]
    return sorted(rows, key=lambda row: (STATES.index(row.state), row.operator))


def write_document(path: Path, rows: list[Row]) -> None:
    """Replace the lines of the table."""
    kept = path.read_text(encoding="utf-8").splitlines()
    head = kept.index(HEAD)
    tail = next((number for number, line in enumerate(kept)
                 if number > head and not line.startswith("|")), len(kept))
    table = [f"| {' | '.join(row.cells())} |" for row in rows]
    path.write_text("\n".join([*kept[:head + 2], *table, *kept[tail:]]) + "\n", encoding="utf-8")


def differences(known: list[Row], rows: list[Row]) -> list[str]:
    """Sentences on where the document and the graphs differ.

    Args:
        known: rows of the document.
        rows: rows of the graphs.
    """
    old, new = ({row.operator: row for row in each} for each in (known, rows))
    found = [f"{name}: new, in {', '.join(new[name].graphs)}" for name in new if name not in old]
    found += [f"{name}: in no graph any more" for name in old if name not in new]
    for name in filter(old.get, new):
        for column, before, now in zip(HEADINGS[1:3], old[name].cells()[1:3],
                                       new[name].cells()[1:3]):
            if before != now:
                found.append(f"{name}: {column} {before} -> {now}")
    return found


class Compiled(NamedTuple):
    """What all graphs compile to.

    Attributes:
        seen: operator -> its use.
        failures: sentences on graphs that do not compile.
    """
    seen: dict[str, Use]
    failures: list[str]


def compile_all() -> Compiled:
    """Compile each graph in a process of its own, one after another."""
    build = subprocess.run(["bash", ROOT / "scripts/rig/build.sh"], stdout=subprocess.PIPE,
                           text=True, check=True).stdout.strip()
    found = Compiled({}, [])
    with tempfile.TemporaryDirectory() as folder:
        for graph in GRAPHS:
            out = Path(folder) / graph
            out.mkdir()
            workers = str(Plan.of(small(graph)).cards)
            result = subprocess.run(
                [sys.executable, __file__, "--compile", graph, out, build], cwd=out,
                capture_output=True, text=True,
                env={**os.environ, "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(out),
                     "GLOG_v": "4", "MS_WORKER_NUM": workers, "RANK_SIZE": workers, "RANK_ID": "0"})
            files = sorted(out.rglob("*_validate_*.ir"))
            if not files:
                errors = re.findall(r"^\w*Error: .+", result.stderr, re.MULTILINE)
                reason = errors[-1] if errors else result.stderr[-1000:]
                found.failures.append(f"{graph} does not compile: {reason}")
                continue
            for name, types in read_graph(files[-1].read_text(encoding="utf-8")):
                use = found.seen.setdefault(name, Use())
                use.graphs.add(graph)
                use.types.add(types)
    return found


def stand_for_rank_0(rig: ctypes.CDLL, settings: dict[str, Any]) -> Any:
    """Make this process rank 0 of the plan, without other ranks.

    The parallel passes only need the groups and their sizes; nothing is sent.

    Returns:
        a callback that must stay alive.
    """
    from mindspore.communication import management
    world = Plan.of(settings).cards
    sizes: dict[str, int] = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint)
    def on_group(name: bytes, _: Any, count: int) -> None:
        sizes[name.decode()] = count

    rig.rig_install(b"Ascend", 0, world, on_group)
    management._get_size_helper = lambda group: sizes.get(group, world)
    management._get_rank_helper = lambda group: 0  # noqa: ARG005
    context = importlib.import_module("mindformers.core.context.build_context")
    vars(context)["init"] = lambda: None
    return on_group


def small(graph: str) -> dict[str, Any]:
    """Settings of a graph's YAML with small sizes."""
    name, mode = GRAPHS[graph]
    settings = config.load_settings(ROOT / "examples/glm4_dpo" / name, run_mode=mode)
    rows = settings["runner_config"]["batch_size"] * Plan.of(settings).data
    return config.with_changes(settings, {
        **{f"model.model_config.{key}": value for key, value in SIZES.items()},
        "dpo.logps_chunk_size": rows * LENGTH // CHUNKS, "output_dir": "."})


def compile_one(graph: str, build_dir: str) -> None:
    """Compile a graph. MindSpore writes it to MS_DEV_SAVE_GRAPHS_PATH.

    Args:
        graph: a key of GRAPHS.
        build_dir: the folder that scripts/rig/build.sh prints.

    Raises:
        RuntimeError: from MindSpore, for the missing device, after the graph is written.
    """
    sys.path.insert(0, str(ROOT / "scripts/rig"))
    rig = importlib.import_module("rig").allow(build_dir, "Ascend", "Ascend")
    settings = small(graph)
    alive = stand_for_rank_0(rig, settings) if Plan.of(settings).is_sharded else None
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build
    from mindrlhf.training import train_step  # noqa: F401  registers the training step
    run_config = config.to_mindformers(settings)
    run_config.parallel.global_rank = 0
    runtime.start_device(run_config, parallel=alive is not None)
    model = build.build_network(run_config)
    if graph in ("train", "lora"):
        train(model, run_config, settings)
    elif graph == "evaluation":
        from mindrlhf.training.evaluate import EvaluationStep
        runtime.evaluation_network(EvaluationStep(model)).set_train(False).compile(
            *columns(settings))
    elif graph == "reference":
        from mindrlhf.models.glm4.network import ReferenceLogps
        rows = settings["runner_config"]["batch_size"]
        batch = [tensor((rows, LENGTH), "int32")] * len(INPUTS)
        ReferenceLogps(model, 2 * PAIRS).set_train(False).compile(*batch)
    else:
        predict(model, graph)


def tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """Zeros."""
    import mindspore as ms
    import numpy as np
    return ms.Tensor(np.zeros(shape, dtype))


def columns(settings: dict[str, Any]) -> list[Any]:
    """A batch of training data, as a card of the plan reads it."""
    from mindrlhf.training.inputs import feed_of
    rows, sizes = feed_of(settings).batch_size, {
        "seq_len": LENGTH, "answers": 2 * PAIRS, "pairs": PAIRS}
    return [tensor((rows, sizes[column.size]), column.dtype) for column in COLUMNS.values()]


def train(model: Any, run_config: Any, settings: dict[str, Any]) -> None:
    """Let MindFormers' Trainer build the training step; compile it as in sink mode, with GetNext.

    Args:
        model: Glm4DPO.
        run_config: MindFormerConfig of the settings.
        settings: of the YAML.
    """
    from mindformers import Trainer
    from mindspore.dataset import NumpySlicesDataset
    from mindspore.train.dataset_helper import _DataWrapper
    from mindspore.train.model import Model
    batch = columns(settings)

    def compile_step(self: Any, *_: Any, **__: Any) -> None:
        wrapped = _DataWrapper(self._train_network, [each.dtype for each in batch],
                               [each.shape for each in batch], "data")
        wrapped.set_train(True).compile()

    Model.train = compile_step
    run_config.lr_schedule.total_steps = 10
    trainer = Trainer(args=run_config, task="text_generation", model=model,
                      train_dataset=NumpySlicesDataset([0] * 10))
    trainer.finetune(finetune_checkpoint=False, resume_training=False, auto_trans_ckpt=False)


def predict(model: Any, graph: str) -> None:
    """Compile what MindFormers' generate() runs.

    Args:
        model: MindFormers' ChatGLM2ForConditionalGeneration.
        graph: "prefill" (the prompt), "increment" (a later token) or "token" (the choice of a
            token, which generate() runs operator by operator).
    """
    import numpy as np
    from mindspore import nn
    if graph == "token":
        class Greedy(nn.Cell):
            """GenerationMixin.postprocess."""

            def construct(self, logits: Any, index: Any) -> Any:
                """The most likely ids at some positions."""
                return argmax(logits.reshape(-1, logits.shape[-1])[index], -1)

        argmax = model.argmax
        Greedy().compile(tensor((3, VOCABULARY), "float32"), tensor((1,), "int32"))
        return
    prompt = np.ones((1, 3 if graph == "prefill" else LENGTH), np.int32)
    model.set_train(False)
    model.set_dynamic_inputs()
    model.phase = graph
    model.add_flags_custom(is_first_iteration=graph == "prefill")
    slots = np.arange(3 if graph == "prefill" else 1, dtype=np.int32)
    model.forward(prompt, np.array([3]), block_tables=np.zeros((1, 8), np.int32), use_past=True,
                  prefill=graph == "prefill", slot_mapping=slots, origin_inputs=prompt)


def main() -> None:
    """Print the operators and the differences from the document; update it with --write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update docs/operators.md")
    parser.add_argument("--compile", nargs=3, metavar=("GRAPH", "FOLDER", "BUILD"),
                        help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_one(arguments.compile[0], arguments.compile[2])
        return
    known = read_document(DOCUMENT.read_text(encoding="utf-8"))
    seen, failures = compile_all()
    rows = merge(known, seen)
    for row in rows:
        print(" | ".join(row.cells()))
    found = failures + differences(known, rows)
    if arguments.write:
        write_document(DOCUMENT, rows)
    print(*found or [f"{DOCUMENT.name} is up to date"], sep="\n", file=sys.stderr)
    sys.exit(1 if failures or (found and not arguments.write) else 0)


if __name__ == "__main__":
    cli.run_command(main)
