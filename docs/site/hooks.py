"""What the documentation site makes of the repository's pages, which are written to be read where they lie, too.

Holds: pages made of files that lie elsewhere (README.md, CHANGELOG.md, CONTRIBUTING.md, examples, the notebook), links
to such files, code fences. Elsewhere: what the site looks like and its order of pages (mkdocs.yml).

A link to a file that is not part of the site leads to the repository, if [project.urls] of pyproject.toml has one under
`Repository`; without, the words stay, and the link goes.
"""

import ast
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Files outside of docs and notebooks, and the pages that are made of them.
MADE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples": "examples.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
FOLDERS = {"docs/criteria": "criteria/interpolative.md"}  # what a link to a folder leads to
FENCE_OR_LINK = re.compile(r"(^ *```.*?^ *```)|(!?)\[([^\]]*)\]\(([^)\s]+)\)", flags=re.DOTALL | re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def examples_page() -> str:
    """Every script of examples/ below what it says of itself."""
    parts = ["# Examples\n\nEach runs as it stands: `python examples/NAME.py`."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        says = ast.get_docstring(ast.parse(source)) or ""
        code = source.split('"""', 2)[2].strip()
        parts.append(f"## {path.stem.replace('_', ' ').capitalize()}\n\n{says}\n\n```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def notebook_page(text: str) -> str:
    """The cells of a notebook, code with what it wrote."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).strip()
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            told = "".join(output.get("text") or data.get("text/plain", ())).rstrip()
            if "image/png" in data:
                parts.append(f"![What the cell above drew](data:image/png;base64,{data['image/png'].strip()})")
            elif "text/html" in data:
                parts.append(re.sub(r"\n\s*", "", "".join(data["text/html"])))
            elif told:
                parts.append(f"```text\n{told}\n```")
    return "\n\n".join(parts) + "\n"


def made_pages() -> dict[str, str]:
    """Return the text of every page of MADE."""
    pages = {page: read(name) for name, page in MADE.items() if name.endswith(".md")}
    pages["examples.md"] = examples_page()
    pages["tutorial.md"] = notebook_page(read("docs/tutorial.ipynb"))
    return pages


def relinked(text: str, source: str, page: str, repository: str | None) -> str:
    """Return the Markdown `text` with links as the site needs them.

    Args:
        text: of the file `source`, a path in the repository.
        page: the path of the site's page made of it, below docs.
        repository: its address; None: it has none.
    """

    def replaced(found: re.Match[str]) -> str:
        fence, bang, words, target = found.groups()
        if fence or target.startswith(("https://", "http://", "mailto:", "data:", "#")):
            return found[0]
        path, _, anchor = target.partition("#")
        there = os.path.normpath(os.path.join(os.path.dirname(source), path))
        made = (
            MADE.get(there)
            or FOLDERS.get(there)
            or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        )
        if made is not None:
            to = os.path.relpath(made, os.path.dirname(page) or ".") + (f"#{anchor}" if anchor else "")
        elif repository:
            to = f"{repository.rstrip('/').removesuffix('.git')}/blob/HEAD/{there}"
        else:
            return words
        return f"{bang}[{words}]({to})"

    return FENCE_OR_LINK.sub(replaced, text)


def repository() -> str | None:
    urls = tomllib.loads(read("pyproject.toml"))["project"].get("urls", {})
    return urls.get("Repository")


def all_names_told(text: str) -> str:
    """Return the page of the reference, with the public names that no part of it tells at its end."""
    nodes = ast.parse(read("src/apoptosis/__init__.py")).body
    lists = [n.value for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    public = ast.literal_eval(lists[0])
    told = set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))
    rest = [name for name in public if f"apoptosis.{name}" not in told]
    return text + ("\n## More\n\n" if rest else "") + "\n".join(f"::: apoptosis.{name}\n" for name in rest)


def listed(menu: Any) -> list[str]:
    """Return the pages of a menu, in its order."""
    if isinstance(menu, str):
        return [menu]
    return [page for entry in (menu.values() if isinstance(menu, dict) else menu) for page in listed(entry)]


def with_rest(menu: list[Any], pages: list[str]) -> list[Any]:
    """Return the menu with the pages that it lacks at its end, so that none is lost."""
    rest = sorted(set(pages) - set(listed(menu)))
    return [*menu, {"More": rest}] if rest else menu


# ---------------------------------------------------------------- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if address := repository():
        config.repo_url = address
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    pages = [file.src_uri for file in files.documentation_pages() if not file.inclusion.is_excluded()]
    config.nav = with_rest(config.nav or [], pages)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    uri = page.file.src_uri
    source = next((name for name, made in MADE.items() if made == uri), f"docs/{uri}")
    if uri == "api.md":
        markdown = all_names_told(markdown)
    markdown = re.sub(r"^```python norun$", "```python", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^(<!-- [\w-]+:begin -->)\n", r"\1\n\n", markdown, flags=re.MULTILINE)
    return relinked(markdown, source, uri, repository())
