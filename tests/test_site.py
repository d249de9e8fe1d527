"""The documentation site: its tutorial runs, its pages are in the menu, its links lead on; docs/site is tested here."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LIMIT = 40.0  # processor seconds of the notebook


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the tutorial


@pytest.mark.filterwarnings("default")  # other libraries' own
def test_the_tutorial_runs_and_says_what_it_is_said_to_say(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs it")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs it")
    pytest.importorskip("ipykernel", reason="the notebook needs it")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    used = "\nprint('used', time.process_time())"
    notebook.cells.append(nbformat.v4.new_code_cell(used))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = "\n".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()) if c.cell_type == "code")
    dense, shrunk = (int(n.replace(",", "")) for n in re.findall(r"^([\d,]+) parameters, test", told, re.MULTILINE))
    assert shrunk < dense / 3
    assert len(re.findall(r"^step \d+: .*->", told, re.MULTILINE)) >= 2  # of training, and of shrink_
    assert re.search(rf"^True {shrunk:,} parameters$", told, re.MULTILINE)  # loaded
    accuracies = [float(n) for n in re.findall(r"accuracy ([\d.]+)%", told)]
    assert min(accuracies) > max(accuracies) - 3.0
    assert float(re.search(r"^used ([\d.]+)$", told, re.MULTILINE)[1]) < LIMIT


def test_the_committed_tutorial_was_run_from_top_to_bottom():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


# ---------------------------------------------------------------- pages and links


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the extra docs makes the site")
    return load("hooks")


def test_the_menu_has_every_page_once(hooks):
    menu = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {page for page in hooks.MADE.values() if page.endswith(".md")}
    assert len(menu) == len(set(menu))
    assert set(menu) <= pages
    whole = hooks.with_rest(["index.md", {"Learn": [{"Guide": "guide.md"}]}], ["guide.md", "b.md", "a.md", "index.md"])
    assert whole == ["index.md", {"Learn": [{"Guide": "guide.md"}]}, {"More": ["a.md", "b.md"]}]
    assert hooks.with_rest(menu, menu) == menu
    assert hooks.listed(whole) == ["index.md", "guide.md", "a.md", "b.md"]


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("[a](docs/guide.md#x)", "README.md", "index.md", "[a](guide.md#x)"),
        ("![a](docs/images/x.svg)", "README.md", "index.md", "![a](images/x.svg)"),
        ("[a](../CHANGELOG.md)", "docs/guide.md", "guide.md", "[a](changelog.md)"),
        ("[a](../theory.md)", "docs/criteria/greedy.md", "criteria/greedy.md", "[a](../theory.md)"),
        ("[a](../../examples)", "docs/networks/others.md", "networks/others.md", "[a](../examples.md)"),
        ("[a](https://example.org) [b](#c)", "README.md", "index.md", "[a](https://example.org) [b](#c)"),
        ("```\nx[a](b)\n```", "README.md", "index.md", "```\nx[a](b)\n```"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(hooks, link, source, page, expected):
    assert hooks.relinked(link, source, page, None) == expected


def test_links_to_other_files_lead_to_the_repository_or_are_words(hooks):
    link = "[the figures](../benchmarks/results/zoo.json)"
    assert hooks.relinked(link, "docs/coverage.md", "coverage.md", None) == "the figures"
    at = hooks.relinked(link, "docs/coverage.md", "coverage.md", "https://github.com/a/b.git")
    assert at == "[the figures](https://github.com/a/b/blob/HEAD/benchmarks/results/zoo.json)"


def test_made_pages_hold_what_they_are_made_of(hooks):
    pages = hooks.made_pages()
    assert set(pages) == {page for page in hooks.MADE.values() if page.endswith(".md")}
    assert all(f"## {path.stem.replace('_', ' ').capitalize()}\n" in pages["examples.md"]
               for path in (ROOT / "examples").glob("*.py"))  # fmt: skip
    assert "```text\nTrue " in pages["tutorial.md"]


def test_the_reference_tells_every_public_name(hooks):
    import apoptosis

    text = hooks.all_names_told((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert {f"apoptosis.{name}" for name in apoptosis.__all__} <= set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


def test_sections_of_docstrings_stand_alone():
    pytest.importorskip("griffe", reason="the extra docs makes the site")
    normalised = load("docstrings").normalised
    text = "Sum.\n\nReturns: a number\n    or so.\n\nExample:\n    >>> 1\n    1\nReference: a paper."
    assert normalised(text) == (
        "Sum.\n\nReturns:\n    a number\n    or so.\n\nExamples:\n    >>> 1\n    1\n**References.**\na paper."
    )
    assert normalised("Args:\n    x: Returns: no.") == "Args:\n    x: Returns: no."


# ---------------------------------------------------------------- tables by kind


def test_every_task_is_of_one_kind_and_every_kind_has_its_page():
    sys.path.insert(0, str(ROOT))
    expected = importlib.import_module("benchmarks.expected")
    tasks = importlib.import_module("benchmarks.paper.tasks").TASKS
    assert sorted(task for kind in expected.KINDS.values() for task in kind.tasks) == sorted(tasks)
    pages = {path.stem for path in (ROOT / "docs" / "networks").glob("*.md")}
    assert pages == {"index", *expected.KINDS}


def test_words_of_pins_name_each_reason_once():
    sys.path.insert(0, str(ROOT))
    words = importlib.import_module("benchmarks.expected")._words
    layer_norm = "native_layer_norm normalises over channels"
    assert words([layer_norm, None, "output", layer_norm, "other"]) == "LayerNorm; other"
    assert words(["output"]) == "nothing"
