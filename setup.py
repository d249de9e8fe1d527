"""The description that package indexes show: README.md with links that work outside the repository.

Holds: that rewriting. Elsewhere: all other metadata (pyproject.toml). An index shows the README alone, so its links to
files and its pictures need an address: that of `Repository` in [project.urls]. Without one, links become their text and
pictures are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
#: Code between fences, which is left as it is; or a link or picture: "!", its text, where it leads.
FENCE_OR_LINK = re.compile(r"(^```.*?^```)|(!?)\[([^\]]*)\]\(([^)\s]+)\)", flags=re.DOTALL | re.MULTILINE)
NO_ADDRESS = "\nThe files named here are in the source distribution, pages in its folder docs.\n"


def standalone(text: str, repository: str | None) -> str:
    """Return the Markdown `text` without relative links.

    Args:
        text: a page that lies in the repository's root.
        repository: its address, as GitHub and GitLab spell it: https://HOST/OWNER/NAME. None: it has none.
    """
    address = (repository or "").rstrip("/").removesuffix(".git")
    inside = f"{address}/-" if "gitlab" in address else address

    def replaced(found: re.Match[str]) -> str:
        fence, bang, words, target = found.groups()
        if fence or target.startswith(("https://", "http://", "mailto:", "#")):
            return found[0]
        if not address:
            return "" if bang else words
        return f"{bang}[{words}]({inside}/{'raw' if bang else 'blob'}/HEAD/{target})"

    return FENCE_OR_LINK.sub(replaced, text) + ("" if address else NO_ADDRESS)


def repository() -> str | None:
    """Return the repository's address, if pyproject.toml has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


if __name__ == "__main__":
    setup(
        long_description=standalone((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
        long_description_content_type="text/markdown",
    )
