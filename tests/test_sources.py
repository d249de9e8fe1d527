"""Rules of the source that neither ruff nor import-linter holds: sizes, outside packages, what every module says of
itself."""

import ast
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

import apoptosis.errors

SRC = Path(apoptosis.errors.__file__).parent
MAX_FILE, MAX_FUNCTION = 500, 60
#: What may be imported from outside; packages that are not listed here take CORE alone.
CORE = {"torch", "numpy", "scipy", "safetensors", "threadpoolctl"}
EXTRAS = {"typer", "rich", "pydantic", "sklearn", "pooch", "matplotlib", "tensorboard", "PIL"}
MORE = {
    "display": {"matplotlib", "tqdm", "rich"},
    "tools.recipes": EXTRAS,
    "tools.cli": EXTRAS,
    "tools.report": {"matplotlib", "jinja2"},
    "tools.launch": {"mpi4py"},
    "shipping": {"onnx", "onnxruntime"},
    "integrations.lightning": {"lightning", "pytorch_lightning"},
    "integrations.accelerate": {"accelerate"},
    "integrations.transformers": {"transformers"},
}

FILES = sorted(SRC.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PATHS = {module_name(path): path for path in FILES}
every_module = pytest.mark.parametrize("module", sorted(TREES))


def outside(tree):
    """(line, package) of everything imported that is neither ours nor the standard library's."""
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {(node.lineno, name.split(".")[0]) for name in names}
    return {(line, top) for line, top in found if top != "apoptosis" and top not in sys.stdlib_module_names}


def length(function):
    """Lines of a function without its docstring, which is to be as long as it needs to be."""
    text = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def long_functions(tree):
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {n.name: length(n) for n in nodes if length(n) >= MAX_FUNCTION}


@every_module
def test_the_core_needs_few_packages(module):
    allowed = CORE | next((more for name, more in MORE.items() if f"{module}.".startswith(f"{name}.")), set())
    assert {(line, top) for line, top in outside(TREES[module]) if top not in allowed} == set()


@every_module
def test_files_and_functions_stay_short(module):
    assert PATHS[module].read_text(encoding="utf-8").count("\n") < MAX_FILE
    assert long_functions(TREES[module]) == {}


@every_module
def test_every_module_says_what_it_holds(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("module", sorted(m for m in TREES if m.startswith("numerics")))
def test_numerics_knows_no_module(module):
    names = {node.module or "" for node in ast.walk(TREES[module]) if isinstance(node, ast.ImportFrom)}
    uses = {ast.unparse(n) for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute)}
    assert not {n for n in names if n.startswith("torch.nn.")}
    assert not {u for u in uses if u.startswith(("nn.", "torch.nn.")) and not u.startswith("torch.nn.functional")}


ROOT = SRC.parents[1]
PYTHON = {
    path.relative_to(ROOT).as_posix()
    for part in ("src", "tests", "benchmarks", "examples")
    for path in (ROOT / part).rglob("*.py")
}
#: Names of packages that stand for something else in prose are left out: `model.parameters()`.
PACKAGES = sorted({name.partition(".")[0] for name in TREES} - {"", "model", "cli", "events", "launch"})
ENDINGS = ("py", "json", "jsonl", "safetensors", "svg")  # of files called like a package


def prose(source):
    """Docstrings and comments of a module."""
    nodes = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    return "\n".join([*filter(None, map(ast.get_docstring, nodes)), *comments])


def names_of_nothing(text):
    """Files and modules of this repository that a text names and that are not there."""
    files = set(re.findall(r"[\w./-]*\w\.py\b", text)) - {"script.py", "net.py"}  # the reader's own
    lost = {name for name in files if not any(path == name or path.endswith(f"/{name}") for path in PYTHON)}
    for package, name in re.findall(rf"(?<![\w./])(?:apoptosis\.)?({'|'.join(PACKAGES)})\.(\w+)(?![\w/])", text):
        there = f"{package}.{name}" in TREES or hasattr(importlib.import_module(f"apoptosis.{package}"), name)
        lost |= set() if there or name in ENDINGS else {f"{package}.{name}"}
    paths = re.findall(rf"(?<![\w./])((?:{'|'.join(PACKAGES)})(?:/\w+)+)(?![\w/.])", text)
    return sorted(lost | {path for path in paths if path.replace("/", ".") not in TREES})


@every_module
def test_no_module_speaks_of_one_that_is_gone(module):
    assert names_of_nothing(prose(PATHS[module].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")))
def test_no_page_speaks_of_a_module_that_is_gone(page):
    assert names_of_nothing((ROOT / page).read_text(encoding="utf-8")) == []


def test_these_checks_can_fail():
    gone = "see `engine/attempt`, numerics.blas, errors.py and numerics/moments.py; apoptosis.graph.neurons, no_such.py"
    assert names_of_nothing(gone) == ["engine/attempt", "graph.neurons", "no_such.py", "numerics.blas"]
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION))
    assert long_functions(ast.parse(f"def f():\n{body}")) == {"f": MAX_FUNCTION + 1}
    docstring = '    """long' + chr(10) * MAX_FUNCTION + '    """'
    assert long_functions(ast.parse(f"def f():\n{docstring}\n    return 1")) == {}
    assert outside(ast.parse("import rich.table, os, torch.nn")) == {(1, "rich"), (1, "torch")}
