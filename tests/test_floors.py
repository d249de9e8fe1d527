"""Rules of the source that no linter holds: floors and sizes. docs/architecture.md says what they are for."""

import ast
import re
import sys
from pathlib import Path

import pytest

import apoptosis.records

SRC = Path(apoptosis.records.__file__).parent
MAX_FILE, MAX_FUNCTION = 500, 60

#: Room (first part of the module's name under apoptosis) -> floor. A room imports from lower floors and from itself.
#: "" is the package's own face, apoptosis/__init__.py.
FLOORS = {
    "records": 1,
    "errors": 1,
    "history": 1,
    "interrupts": 1,
    "module_state": 1,
    "kept": 2,
    "numerics": 2,
    "policy": 2,
    "events": 2,
    "ledger": 2,
    "outputs": 2,
    "sites": 2,
    "calibration": 2,
    "passes": 2,
    "ranks": 2,
    "unwrap": 2,
    "sharded": 2,
    "launch": 3,
    "norms": 2,
    "responses": 1,
    "files": 1,
    "plain_json": 1,
    "arguments": 3,
    "distributed": 3,
    "criteria": 3,
    "graph": 3,
    "surgery": 3,
    "observe": 3,
    "probe": 3,
    "budget": 3,
    "report": 3,
    "planner": 4,
    "verdict": 4,
    "trials": 4,
    "operate": 5,
    "sampling": 5,
    "rehearsal": 6,
    "told": 6,
    "state": 6,
    "attempt": 7,
    "engine": 8,
    "oneshot": 7,
    "": 9,
    "recipes": 10,
    "cli": 11,
}
#: What may be imported from outside; the rooms not listed here take CORE alone.
CORE = {"torch", "numpy", "scipy", "safetensors", "threadpoolctl"}
EXTRAS = {"typer", "rich", "pydantic", "sklearn", "pooch", "matplotlib", "tensorboard"}
EXTRA_ROOMS = {
    "recipes": EXTRAS,
    "cli": EXTRAS,
    "report": {"matplotlib"},
    "launch": {"mpi4py"},
}

FILES = sorted(SRC.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PATHS = {module_name(path): path for path in FILES}
every_module = pytest.mark.parametrize("module", sorted(TREES))


def room(module):
    return module.split(".")[0]


def run_time_nodes(tree):
    """All nodes but those under `if TYPE_CHECKING:`, which import nothing when the program runs."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse
        todo.extend(children)


def imports(module, tree):
    """(line, absolute dotted name) of everything imported; `from a import b` gives a.b where that is a module."""
    found = []
    package = module.split(".") if PATHS.get(module, Path()).name == "__init__.py" else module.split(".")[:-1]
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(["apoptosis", *(p for p in above if p), *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner.removeprefix("apoptosis.") in TREES and inner.startswith("apoptosis.")
                found.append((node.lineno, inner if is_module else base))
    return found


def own_imports(module, tree):
    names = [(line, name) for line, name in imports(module, tree) if name.split(".")[0] == "apoptosis"]
    return [(line, name.removeprefix("apoptosis").removeprefix(".")) for line, name in names]


def outside_imports(module, tree):
    tops = {(line, name.split(".")[0]) for line, name in imports(module, tree)}
    return {(line, top) for line, top in tops if top != "apoptosis" and top not in sys.stdlib_module_names}


def upward(module, tree):
    """Imports that do not point down: (line, imported)."""
    here = room(module)
    return [
        (line, name)
        for line, name in own_imports(module, tree)
        if room(name) != here and FLOORS[room(name)] >= FLOORS[here]
    ]


def cycle(edges):
    """Modules on a circle of imports, in order; [] if there is none."""
    state = {}

    def visit(module, path):
        if state.get(module) == "done":
            return []
        if state.get(module) == "open":
            return [*path[path.index(module) :], module]
        state[module] = "open"
        for target in edges.get(module, ()):
            if found := visit(target, [*path, module]):
                return found
        state[module] = "done"
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def length(function):
    """Lines of a function without its docstring, which is to be as long as it needs to be."""
    text = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def long_functions(tree):
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {n.name: length(n) for n in nodes if length(n) >= MAX_FUNCTION}


def test_every_room_has_a_floor():
    missing = {room(module) for module in TREES} - FLOORS.keys()
    assert not missing, f"rooms without a floor: {sorted(missing)}; put them into FLOORS and docs/architecture.md"


@every_module
def test_imports_point_down(module):
    assert upward(module, TREES[module]) == []


def test_no_module_imports_itself_through_others():
    edges = {m: [n for _, n in own_imports(m, tree) if n in TREES and n != m] for m, tree in TREES.items()}
    assert cycle(edges) == []


@every_module
def test_the_core_needs_four_packages_and_the_standard_library(module):
    allowed = CORE | EXTRA_ROOMS.get(room(module), set())
    assert {(line, top) for line, top in outside_imports(module, TREES[module]) if top not in allowed} == set()


@every_module
def test_files_and_functions_stay_short(module):
    num_lines = PATHS[module].read_text(encoding="utf-8").count("\n")
    assert num_lines < MAX_FILE
    assert long_functions(TREES[module]) == {}


@every_module
def test_every_module_says_what_lives_there(module):
    docstring = ast.get_docstring(TREES[module]) or ""
    if PATHS[module].name == "__init__.py":
        assert docstring or not TREES[module].body
    else:
        assert "Lives here:" in docstring


@pytest.mark.parametrize("module", sorted(m for m in TREES if room(m) == "numerics"))
def test_numerics_knows_no_module(module):
    names = {name for _, name in imports(module, TREES[module])}
    uses = {ast.unparse(n) for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute)}
    assert not {n for n in names if n.startswith("torch.nn.")}
    assert not {u for u in uses if u.startswith(("nn.", "torch.nn.")) and not u.startswith("torch.nn.functional")}


def test_the_page_tells_the_same_floors():
    page = (SRC.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`[\w/]+`|the package itself) \|", page, flags=re.MULTILINE)
    rooms = {room(module) for module in TREES}
    expected = {name or "the package itself": floor for name, floor in FLOORS.items() if name in rooms}
    assert {name.strip("`/"): int(floor) for floor, name in rows} == expected


def test_the_report_reads_the_log_alone():
    used = {room(name) for m, tree in TREES.items() if room(m) == "report" for _, name in own_imports(m, tree)}
    assert used <= {"report", "events", "errors", "files"}  # the last writes pages whole; none of them trains


# The checks themselves: each must be able to fail.


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("records", "from apoptosis.engine import Apoptosis"),
        ("numerics.bounds", "from ..planner import make_plan"),
        ("graph", "from apoptosis import surgery"),
        ("engine", "import apoptosis.recipes.loop"),
        ("policy", "def f():\n    from apoptosis import Apoptosis"),
        ("events", "from apoptosis.policy import decide"),
    ],
)
def test_an_upward_or_sideways_import_is_seen(module, code):
    assert len(upward(module, ast.parse(code))) == 1


def test_imports_for_types_alone_are_no_imports():
    code = "if TYPE_CHECKING:\n    from apoptosis.engine import Apoptosis\nelse:\n    import numpy"
    assert upward("state", ast.parse(code)) == []
    assert outside_imports("state", ast.parse(code)) == {(4, "numpy")}


def test_the_other_checks_can_fail():
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION))
    assert long_functions(ast.parse(f"def f():\n{body}")) == {"f": MAX_FUNCTION + 1}
    docstring = '    """long' + chr(10) * MAX_FUNCTION + '    """'
    assert long_functions(ast.parse(f"def f():\n{docstring}\n    return 1")) == {}
    assert outside_imports("engine", ast.parse("import rich.table, os, torch.nn")) == {(1, "rich"), (1, "torch")}
    assert cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
