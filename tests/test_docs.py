"""The pages: their code runs, their links lead somewhere, their tables are the JSON's, their options exist."""

import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


sys.path.insert(0, str(ROOT))  # benchmarks are modules of the repository, not of the package


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = importlib.import_module("benchmarks.table")


# ---------------------------------------------------------------- code


def names_that_readers_have():
    """What the pages take for granted: a small model whose first layer is wider than its data have directions."""
    torch.manual_seed(0)
    x = torch.randn(1152, 2) @ torch.randn(2, 12)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

    def build():
        model = nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
        return model, torch.optim.Adam(model.parameters(), lr=1e-3)

    model, optimizer = build()
    loader = DataLoader(TensorDataset(x[:1024], y[:1024]), batch_size=64)
    return {
        "build": build,
        "model": model,
        "optimizer": optimizer,
        "trained": build()[0],
        "example_input": x[:2],
        "loader": loader,
        "batches": [batch for batch, _ in loader],
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 20,
        "probe_x": x[1024:],
        "probe_y": y[1024:],
    }


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(p.relative_to(ROOT)) for p in WITH_CODE])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys, registries):
    monkeypatch.chdir(tmp_path)
    names = names_that_readers_have()
    if page.name == "from-torch-pruning.md":
        pytest.importorskip("torch_pruning", reason="the page puts it beside this library")
    if page.name == "lightning.md":
        warnings.simplefilter("ignore")  # the library's own, of torch and of its settings; pytest puts filters back
        pytest.importorskip("lightning", reason="the page is about it")
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, python block {number}", "exec"), names)
    if page.name == "README.md":
        assert names["model"][0].out_features < 1024
        assert re.search(r"^step \d+: .*->", capsys.readouterr().out, flags=re.MULTILINE)


def test_readme_has_the_install_command_and_exactly_two_for_a_clone():
    shell = [line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert [line for line in shell if line] == ["pip install torch-apoptosis", "make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test", "check", "format"} <= set(targets)


# ---------------------------------------------------------------- links


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    return broken


@every_page
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](none.md) [b](#one-two) [c](#three) [d](https://example.org) [e](page.md)\n")
    assert broken_links(page) == ["none.md", "#three"]


@every_page
def test_pages_name_no_place_of_one_machine(page):
    assert re.findall(r"(?:^|[\s`'\"(])/(?:home|root|work|tmp|Users)/\S*", page.read_text(encoding="utf-8")) == []


# ---------------------------------------------------------------- tables


def test_tables_are_what_the_json_says():
    results = table.read_results()
    for page in table.PAGES:
        text = page.read_text(encoding="utf-8")
        assert table.fill(text, results) == text, "run: python -m benchmarks.table --write"


def test_every_table_has_its_place_and_every_marker_its_table():
    text = "".join(page.read_text(encoding="utf-8") for page in table.PAGES)
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) == set(table.TABLES)
    assert text.count(":begin -->") == text.count(":end -->")


OVERHEAD = {
    "seed": 0, "steps": 1000, "total_steps": 1000, "events": 1,
    "seconds_with": 10.2, "seconds_without": 10.0, "share_by_difference": 0.0196,
    "parts": {"construction": 0.05, "windows": 0.1, "events": 0.05, "between": 0.0},
    "attempts": [
        {"seconds": 0.06, "event_seconds": 0.04, "predicted_seconds": 0.12},
        {"seconds": 0.04, "event_seconds": 0.01, "predicted_seconds": 0.04},
    ],
}  # fmt: skip


def test_overhead_rows():
    overhead = {"kind": "overhead", "network": "MLP", "runs": [OVERHEAD]}
    assert table.overhead_table({"o": overhead}).splitlines()[2] == (
        "| MLP | 1,000 of 1,000 | 10 ms | 2, 1 | 10.2 s | 1.96 % | 0.05 s | 0.10 s | 0.05 s | 0.06 + 0.04 s "
        "| 0.8 to 1.2 |"
    )
    none = {**overhead, "runs": [OVERHEAD | {"attempts": [], "events": 0}]}
    assert table.overhead_table({"o": none}).splitlines()[2].endswith("| 0.05 s |  |  |")
    stopped = {**overhead, "runs": [OVERHEAD | {"total_steps": 2000}]}
    assert "| 10.2 s |  | 0.05 s |" in table.overhead_table({"o": stopped})


def test_capture_rows():
    run = {"network": "llama", "fake": True, "parameters": 1_100_048_384, "weights": 156, "groups": 80,
           "groups_free": 40, "seconds_first": 2.204, "seconds_next": 2.0, "processor_seconds_next": 1.9,
           "bytes_beyond_weights": 256 * 2**20, "limit_seconds": 60.0, "limit_bytes": 2.0 * 2**30}  # fmt: skip
    small = run | {"network": "mlp", "fake": False, "limit_bytes": None}
    rows = table.capture_table({"c": {"kind": "capture", "runs": [run, small]}}).splitlines()[2:]
    assert rows[0] == (
        "| llama, fake tensors | 1,100.0 million | 156 | 80, 40 | 2.20 s | 2.00 s | 1.90 s | 256 MiB | 60 s, 2 GiB |"
    )
    assert rows[1].endswith("| 60 s |")


def test_the_figures_of_captures_are_within_their_limits():
    runs = table.read_results()["capture-cost"]["runs"]
    assert {run["network"] for run in runs} == set(load_script("capture_cost").NETWORKS)
    for run in runs:
        assert run["limit_seconds"] is None or run["seconds_first"] < run["limit_seconds"]
        assert run["limit_bytes"] is None or run["bytes_beyond_weights"] < run["limit_bytes"]
    assert next(run["parameters"] for run in runs if run["fake"]) > 1e9


def test_filling_is_stable_and_says_what_is_missing():
    page = "a\n<!-- overhead:begin -->\nold\n<!-- overhead:end -->\nb"
    empty = table.fill(page, {})
    assert "python -m benchmarks.overhead" in empty
    assert "old" not in empty
    assert table.fill(empty, {}) == empty
    full = table.fill(empty, {"x": {"kind": "overhead", "network": "a|b", "runs": [OVERHEAD]}})
    assert full.startswith("a\n<!-- overhead:begin -->\n| network |")
    assert "| a\\|b |" in full
    assert full.endswith("|\n<!-- overhead:end -->\nb")
    with pytest.raises(ValueError, match="has no"):
        table.fill("<!-- overhead:begin -->", {})


# ---------------------------------------------------------------- the command


def options_of():
    """Verb -> option names, as the command itself has them."""
    typer = pytest.importorskip("typer")
    from apoptosis.tools.cli.app import app

    command = typer.main.get_command(app)
    flags = {
        verb: {n for p in sub.params for n in (*p.opts, *p.secondary_opts)} for verb, sub in command.commands.items()
    }
    return {verb: {n for n in names if n.startswith("--")} - {"--help"} for verb, names in flags.items()}


def cli_sections():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    return {part.split("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}


def test_every_option_is_in_the_section_of_its_verb_and_no_other():
    options, sections = options_of(), cli_sections()
    assert set(sections) == set(options)
    for verb, section in sections.items():
        told = set(re.findall(r"`(--[\w-]+)`", section))
        known = options[verb]
        if verb == "compare":
            assert known <= told | set(re.findall(r"`(--[\w-]+)`", sections["train"]))
            assert options["train"] - known == {"--launcher", "--seed", "--resume", "--apoptosis", "--no-apoptosis"}
            told -= {"--launcher", "--seed", "--resume", "--no-apoptosis"}
        else:
            assert known <= told, f"{verb} has options that docs/cli.md does not tell"
        assert told <= known, f"docs/cli.md tells options that {verb} has not"


def test_command_lines_of_the_pages_have_only_options_that_exist():
    options = options_of()
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    calls = [line.split() for line in lines if line.startswith("apoptosis ")]
    assert calls
    for call in calls:
        assert {word for word in call[2:] if word.startswith("--")} <= options[call[1]]
