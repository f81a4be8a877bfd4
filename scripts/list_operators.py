"""List the operators of the graphs that the 9B YAMLs compile to, with what docs/operators.md knows of each on an NPU.

    python scripts/list_operators.py            # what differs from docs/operators.md; status 1 where anything does
    python scripts/list_operators.py --write    # bring its columns "graphs" and "types seen" up to date

MindSpore's front end runs here as on an NPU: target Ascend, bfloat16, the NPU's operators, the parallel plan as rank 0 of
it. No NPU is needed, because the front end writes the finished graph to a file before it asks for the device; the error
that follows is expected. Only sizes are other than in the YAMLs. Facts about an operator stand in the document alone; one
that it does not know gets "unclear: not looked up". Needs g++ and MindSpore 2.7 (for scripts/rig), and about a minute.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/operators.md"
sys.path.insert(0, str(ROOT))

from mindrlhf import cli, config  # noqa: E402
from mindrlhf.parallel import Plan  # noqa: E402
from mindrlhf.records import COLUMNS  # noqa: E402

# the compiled graphs -> the YAML and the run_mode of each
GRAPHS = {"train": ("finetune_glm4_9b.yaml", "finetune"), "lora": ("finetune_glm4_9b_lora.yaml", "finetune"),
          "evaluation": ("finetune_glm4_9b.yaml", "finetune"), "reference": ("process_glm4_9b.yaml", "preprocess"),
          "prefill": ("predict_glm4_9b.yaml", "predict"), "increment": ("predict_glm4_9b.yaml", "predict"),
          "token": ("predict_glm4_9b.yaml", "predict")}
LENGTH, PAIRS = 128, 8  # positions of a row, and its pairs
VOCABULARY = 528
SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "seq_length": LENGTH, "padded_vocab_size": VOCABULARY}
CHUNKS = 4  # of the log-probs' positions
# what the compiler puts between operators; it runs nothing on a device
STRUCTURE = {"Depend", "Load", "MakeTuple", "Partial", "Return", "Switch", "SwitchLayer", "TupleGetItem", "UpdateState"}
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
        return (self.operator, ", ".join(self.graphs), "; ".join(self.types), self.ascend, self.documented, self.source)

    @property
    def state(self) -> str:
        return self.ascend.split(":")[0]


@dataclass
class Use:
    """Where an operator was seen, and with which types: "inputs -> outputs", each type once, in order."""
    graphs: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)


def kinds(text: str) -> str:
    """Types of the tensors in a part of a line of the graph: "bfloat16, uint8", or "-" for none."""
    return ", ".join(dict.fromkeys(found[0].lower() for found in TENSOR.findall(text))) or "-"


def read_graph(text: str) -> Iterable[tuple[str, str]]:
    """(operator, types) of each node in a graph as MindSpore writes it; the types stand in the line after the node's."""
    lines = text.splitlines()
    for line, below in zip(lines, lines[1:]):
        node = NODE.match(line)
        if node and node[1] not in STRUCTURE and below.lstrip().startswith(": ("):
            inputs, _, outputs = below.partition(") -> (")
            yield node[1], f"{kinds(inputs)} -> {kinds(outputs)}"


def read_document(text: str) -> list[Row]:
    """Rows of the document's table.

    Raises:
        UserError: a row is not one of the table's, by its number of cells or what it says of Ascend.
    """
    lines = text.splitlines()
    rows = []
    for line in lines[lines.index(HEAD) + 2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if len(cells) != len(HEADINGS) or cells[3].split(":")[0] not in STATES:
            raise cli.UserError(f"{DOCUMENT}: {len(HEADINGS)} cells expected, the fourth with {', '.join(STATES)}: {line}")
        rows.append(Row(cells[0], tuple(cells[1].split(", ")), tuple(cells[2].split("; ")), *cells[3:]))
    return rows


def merge(known: Iterable[Row], seen: dict[str, Use]) -> list[Row]:
    """A row for each operator seen, with its facts where they are known, in the order of the document."""
    facts = {row.operator: row for row in known}
    rows = [replace(facts.get(name, Row(name, (), ())), graphs=tuple(graph for graph in GRAPHS if graph in use.graphs),
                    types=tuple(sorted(use.types))) for name, use in seen.items()]
    return sorted(rows, key=lambda row: (STATES.index(row.state), row.operator))


def write_document(path: Path, rows: list[Row]) -> None:
    """Replace the lines of the table."""
    kept = path.read_text(encoding="utf-8").splitlines()
    head = kept.index(HEAD)
    tail = next((number for number, line in enumerate(kept) if number > head and not line.startswith("|")), len(kept))
    table = [f"| {' | '.join(row.cells())} |" for row in rows]
    path.write_text("\n".join([*kept[:head + 2], *table, *kept[tail:]]) + "\n", encoding="utf-8")


def differences(known: list[Row], rows: list[Row]) -> list[str]:
    """What the document says otherwise than the graphs, in words."""
    old, new = ({row.operator: row for row in each} for each in (known, rows))
    found = [f"{name}: new, in {', '.join(new[name].graphs)}" for name in new if name not in old]
    found += [f"{name}: in no graph any more" for name in old if name not in new]
    for name in filter(old.get, new):
        for column, before, now in zip(HEADINGS[1:3], old[name].cells()[1:3], new[name].cells()[1:3]):
            if before != now:
                found.append(f"{name}: {column} {before} -> {now}")
    return found


def compile_all() -> tuple[dict[str, Use], list[str]]:
    """Compile each graph in a process of its own, one after another.

    Returns:
        (operator -> its use, sentences on graphs that do not compile).
    """
    build = subprocess.run(["bash", ROOT / "scripts/rig/build.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout
    seen: dict[str, Use] = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        for graph in GRAPHS:
            out = Path(folder) / graph
            out.mkdir()
            workers = str(cards(small(graph)))
            result = subprocess.run(
                [sys.executable, __file__, "--compile", graph, out, build.strip()], cwd=out, capture_output=True, text=True,
                env={**os.environ, "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(out), "GLOG_v": "4",
                     "MS_WORKER_NUM": workers, "RANK_SIZE": workers, "RANK_ID": "0"})
            files = sorted(out.rglob("*_validate_*.ir"))
            if not files:
                errors = re.findall(r"^\w*Error: .+", result.stderr, re.MULTILINE)
                failures.append(f"{graph} does not compile: {errors[-1] if errors else result.stderr[-1000:]}")
                continue
            for name, types in read_graph(files[-1].read_text(encoding="utf-8")):
                use = seen.setdefault(name, Use())
                use.graphs.add(graph)
                use.types.add(types)
    return seen, failures


def stand_for_rank_0(rig: ctypes.CDLL, settings: dict) -> Any:
    """Let this process be rank 0 of the plan, without the others: what must stay alive.

    The parallel passes need to know groups and their sizes only; nothing is sent.
    """
    from mindspore.communication import management
    world = cards(settings)
    sizes: dict[str, int] = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint)
    def on_group(name, _, count):
        sizes[name.decode()] = count

    rig.rig_install(b"Ascend", 0, world, on_group)
    management._get_size_helper = lambda group: sizes.get(group, world)
    management._get_rank_helper = lambda group: 0  # noqa: ARG005
    importlib.import_module("mindformers.core.context.build_context").init = lambda: None
    return on_group


def small(graph: str) -> dict:
    """Settings of a graph's YAML with small sizes."""
    name, mode = GRAPHS[graph]
    settings = config.load_settings(ROOT / "examples/glm4_dpo" / name, run_mode=mode)
    rows = settings["runner_config"]["batch_size"] * settings.get("parallel_config", {}).get("data_parallel", 1)
    return config.with_changes(settings, {**{f"model.model_config.{key}": value for key, value in SIZES.items()},
                                     "dpo.logps_chunk_size": 2 * rows * LENGTH // CHUNKS, "output_dir": "."})


def cards(settings: dict) -> int:
    """Cards of the plan, 1 without one."""
    plan = settings.get("parallel_config", {})
    return plan["data_parallel"] * plan["model_parallel"] if Plan.of(settings).is_sharded else 1


def compile_one(graph: str, build: str) -> None:
    """Compile a graph; MindSpore writes it to MS_DEV_SAVE_GRAPHS_PATH, then raises the missing device's RuntimeError."""
    sys.path.insert(0, str(ROOT / "scripts/rig"))
    rig = importlib.import_module("rig").allow(build, "Ascend", "Ascend")
    settings = small(graph)
    plan = stand_for_rank_0(rig, settings) if Plan.of(settings).is_sharded else None
    from mindrlhf import runtime
    from mindrlhf.training import train_step  # noqa: F401  registers the training step
    run_config = config.to_mindformers(settings)
    run_config.parallel.global_rank = 0
    runtime.start_device(run_config, parallel=plan is not None)
    model = build.build_network(run_config)
    if graph in ("train", "lora"):
        train(model, run_config, settings)
    elif graph == "evaluation":
        batch = columns(settings)
        weights = tensor((batch[0].shape[0], 2), "float32")
        runtime.evaluation_network(model).set_train(False).compile(*batch, weights)
    elif graph == "reference":
        from mindrlhf.models.glm4.network import ReferenceLogps
        rows = settings["runner_config"]["batch_size"]
        ReferenceLogps(model, PAIRS).set_train(False).compile(*[tensor((rows, LENGTH), "int32")] * 8)
    else:
        predict(model, graph)


def tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """Zeros."""
    import mindspore as ms
    import numpy as np
    return ms.Tensor(np.zeros(shape, dtype))


def columns(settings: dict) -> list:
    """A batch of training data, as the plan's cards are fed it."""
    from mindrlhf.training.run import feed_of
    rows, sizes = feed_of(settings)["batch_size"], {"seq_len": LENGTH, "pairs": PAIRS}
    return [tensor((rows, sizes[size]), kind) for kind, size in COLUMNS.values()]


def train(model: Any, run_config: Any, settings: dict) -> None:
    """Have MindFormers' Trainer build the training step, and compile it as in sink mode: with the data's GetNext."""
    from mindformers import Trainer
    from mindspore.dataset import NumpySlicesDataset
    from mindspore.train.dataset_helper import _DataWrapper
    from mindspore.train.model import Model
    batch = columns(settings)

    def compile_step(self, *_, **__):
        wrapped = _DataWrapper(self._train_network, [each.dtype for each in batch], [each.shape for each in batch], "data")
        wrapped.set_train(True).compile()

    Model.train = compile_step
    run_config.lr_schedule.total_steps = 10
    Trainer(args=run_config, task="text_generation", model=model, train_dataset=NumpySlicesDataset([0] * 10)).finetune(
        finetune_checkpoint=False, resume_training=False, auto_trans_ckpt=False)


def predict(model: Any, graph: str) -> None:
    """Compile what MindFormers' generate() runs: the prompt, a later token, or the choice of a token, which it runs
    operator by operator."""
    import numpy as np
    from mindspore import nn
    if graph == "token":
        class Greedy(nn.Cell):
            """GenerationMixin.postprocess."""

            def construct(self, logits, index):
                """The most likely id at some positions."""
                return argmax(logits.reshape(-1, logits.shape[-1])[index], -1)

        argmax = model.argmax
        Greedy().compile(tensor((3, VOCABULARY), "float32"), tensor((1,), "int32"))
        return
    prompt = np.ones((1, 3 if graph == "prefill" else LENGTH), np.int32)
    model.set_train(False)
    model.set_dynamic_inputs()
    model.phase = graph
    model.add_flags_custom(is_first_iteration=graph == "prefill")
    model.forward(prompt, np.array([3]), block_tables=np.zeros((1, 8), np.int32), use_past=True, prefill=graph == "prefill",
                  slot_mapping=np.arange(3 if graph == "prefill" else 1, dtype=np.int32), origin_inputs=prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring docs/operators.md up to date")
    parser.add_argument("--compile", nargs=3, metavar=("GRAPH", "FOLDER", "BUILD"), help=argparse.SUPPRESS)
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
