"""The code blocks of the pages in docs/, with the texts that the pages include."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = ("python", "bash")
SHOWN = ("text", "csv", "json", "toml")

_INCLUDE = r"<!-- include: .*? -->"
# A block with its mark, or a mark that is followed by neither a block nor an include.
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>.*?)\n(?P<code>.*?)^```$"
    r"|^(?P<stray><!-- not run.*)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    language: str
    code: str
    reason: str | None  # why it is not run


def load_include() -> ModuleType:
    """Returns docs/include.py, the hook that mkdocs calls."""
    spec = importlib.util.spec_from_file_location("include", DOCS / "include.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks_of(page: str) -> list[Block]:
    """Returns the code blocks of a page's Markdown, with those of the included texts, in order.

    A mark before an include applies to every block of the included text.
    """
    include = load_include()

    def put(found: re.Match[str]) -> str:
        mark, directive = found[1] or "", found[2]
        text = include.expand(directive)
        return re.sub(r"^```(?=\w)", lambda fence: mark + fence[0], text, flags=re.MULTILINE)

    page = re.sub(rf"^(<!-- not run: .+? -->\n)?({_INCLUDE})$", put, page, flags=re.MULTILINE)
    if found := re.search(r"^(?:[ \t>]+```|[ \t>]*~~~).*", page, re.MULTILINE):
        raise ValueError(f"expected blocks to begin with ``` in the first column, got {found[0]}")
    blocks = []
    for found in _BLOCK.finditer(page):
        if found["stray"]:
            raise ValueError(f"expected a reason and then a code block, got {found['stray']}")
        if found["language"] not in (*RUN, *SHOWN):
            raise ValueError(f"expected one of {(*RUN, *SHOWN)}, got ```{found['language']}")
        if found["language"] in RUN:
            blocks.append(Block(found["language"], found["code"], found["reason"]))
    return blocks
