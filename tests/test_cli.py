"""What all commands share: imports, help, README commands, errors of one line."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import EXAMPLE, ROOT, assert_one_error, run_script

from mindrlhf import cli
from mindrlhf.cli import UserError

COMMANDS = {
    "convert_weight.py": "convert_weight",
    "transform_checkpoint.py": "transform_checkpoint",
    "dpo_preprocess_glm4_parallel.py": "dpo_preprocess_glm4_parallel",
    "run_dpo.py": "run_dpo",
    "make_tiny_glm4.py": "make_tiny_glm4",
}
DOCUMENTS = [
    "README.md",
    "README_CN.md",
    "examples/glm4_dpo/README.md",
    "examples/glm4_dpo/README_CN.md",
    "docs/several_machines.md",
    "docs/several_machines_CN.md",
    "docs/operators.md",
    "scripts/rig/README.md",
]
COMPLETE = DOCUMENTS[:4]  # these have every command
MODULES = sorted(
    str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "mindrlhf").rglob("*.py")
)
WITHOUT_MINDSPORE = [
    "mindrlhf.cli",
    "mindrlhf.config",
    "mindrlhf.checkpoints.containers",
    "mindrlhf.checkpoints.strict",
    "mindrlhf.models.glm4.weight_names",
    "mindrlhf.models.glm4.load",
    "mindrlhf.models.glm4.tiny",
    "mindrlhf.models.glm4.template",
    "mindrlhf.models.glm4.tokenizer",
    "mindrlhf.data.preference",
    "mindrlhf.data.features",
    "mindrlhf.data.packing",
    "mindrlhf.data.mindrecord",
    "mindrlhf.data.dataset",
    "mindrlhf.data.reference",
    "mindrlhf.data.preprocess",
    "mindrlhf.metrics",
    "mindrlhf.inference.generate",
    "mindrlhf.inference.score",
    "mindrlhf.inference.score_record",
    "mindrlhf.card.__main__",
    "convert_weight",
    "transform_checkpoint",
]


@pytest.mark.parametrize("name", [*MODULES, *COMMANDS.values()])
def test_every_module_imports_and_says_what_it_is(name):
    assert importlib.import_module(name).__doc__


def test_plain_modules_import_without_mindspore():
    code = (
        "import sys; sys.modules['mindspore'] = sys.modules['mindformers'] = None; "
        "sys.path[:0] = sys.argv[1:3]; import importlib; "
        "[importlib.import_module(name) for name in sys.argv[3:]]"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(EXAMPLE), *WITHOUT_MINDSPORE],
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", COMMANDS.values())
def test_help_has_an_example_that_parses(name, capsys):
    parser = importlib.import_module(name).parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    example = text[text.index("example:") :].removeprefix("example:")
    lines = commands(example)
    assert lines
    for script, arguments in lines:
        importlib.import_module(COMMANDS[script]).parser().parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS.values())
def test_every_option_is_explained(name):
    for action in importlib.import_module(name).parser()._actions:
        assert action.help, action.option_strings


def commands(text):
    """(script, arguments) of every call of a command in a text, through the launcher or not."""
    text = text.replace("\\\n", " ")
    found = []
    for script in COMMANDS:
        for match in re.finditer(rf'("?)(?:[\w./]*/)?{re.escape(script)} ([^\n`]*)', text):
            rest = match[2].split('"')[0] if match[1] else re.split(r" > | #", match[2])[0]
            if "--" in rest:
                found.append((script, shlex.split(rest)))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents_parse(document):
    lines = commands((ROOT / document).read_text(encoding="utf-8"))
    assert document not in COMPLETE or {
        "convert_weight.py",
        "transform_checkpoint.py",
        "dpo_preprocess_glm4_parallel.py",
        "run_dpo.py",
    } <= {script for script, _ in lines}
    for script, arguments in lines:
        importlib.import_module(COMMANDS[script]).parser().parse_args(arguments)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_the_documents_name_are_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def test_both_readmes_have_the_same_commands():
    english, chinese = (
        commands((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS[:2]
    )
    assert english == chinese


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--confi", "x"], "arguments"),
        (["--config", "x", "--predict"], "unrecognized arguments: --predict"),
        (["--config", "x", "--auto_trans_ckpt", "maybe"], "expected True or False, got 'maybe'"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, part):
    assert_one_error(run_script(EXAMPLE / "run_dpo.py", *arguments), part)


def test_convert_refuses_an_unknown_dtype():
    result = run_script(
        ROOT / "convert_weight.py",
        "--model",
        "glm-n",
        "--input_path",
        ".",
        "--output_path",
        "x.ckpt",
        "--dtype",
        "int4",
    )
    assert_one_error(result, "invalid choice: 'int4'")


def test_booleans_are_real():
    assert [cli.boolean(text) for text in ("True", "false", "1", "no")] == [
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(Exception, match="got '2'"):
        cli.boolean("2")


def test_text_cannot_control_the_terminal():
    assert cli.printable("a\x1b[31m\r\n\0\u202e🙂中") == r"a\x1b[31m\r\n\x00\u202e🙂中"


def test_existing_file_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").touch()
    for path, part in (
        (tmp_path, "is a folder"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "empty", "is empty"),
    ):
        with pytest.raises(UserError, match=part):
            cli.existing_file(path, "a thing")


def test_predict_needs_text_that_fits(golden):
    import run_dpo

    base = ["--config", str(golden.predict), "--vocab_file", str(golden.tokenizer)]
    with pytest.raises(UserError, match="needs --predict_data"):
        run_dpo.main(base)
    with pytest.raises(UserError, match="shorten it"):
        run_dpo.main([*base, "--predict_data", "x" * 1000])
