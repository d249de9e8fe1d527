"""Docstrings as the reference of the site reads them: a section begins on a line of its own, and examples are code.

Holds: that rewriting, as an extension of griffe. Elsewhere: pages and links (hooks.py).
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples|References?):[ ]*(.*)$")


def normalised(text: str) -> str:
    """Return a docstring whose sections are as Google's style has them.

    >>> normalised("Sum.\\n\\nReturns: a number\\n    or so.")
    'Sum.\\n\\nReturns:\\n    a number\\n    or so.'
    """
    lines = []
    for line in text.split("\n"):
        found = SECTION.match(line)
        if found is None:
            lines.append(line)
        elif found[1].startswith("Reference"):
            lines += ["**References.**", found[2].strip()]
        else:
            lines.append("Examples:" if found[1].startswith("Example") else f"{found[1]}:")
            lines += [f"    {found[2]}"] if found[2] else []
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = normalised(obj.docstring.value)
