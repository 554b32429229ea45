"""Puts texts of the source tree into the pages of docs/, so that each text has one source.

A page holds lines of two kinds, which a Markdown viewer hides:

    <!-- include: README.md#Install -->     the section of that heading, without the heading
    <!-- include: himo/evaluate/datasets.md -->  a whole file
    <!-- not run: REASON -->                tests leave out the next code block, or include

Links of an included text lead to the page that includes their target. A picture is added to the
site. Any other file is named by its path. mkdocs calls the functions `on_...`; the tests call the
others, which need no mkdocs.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

INCLUDE = re.compile(r"^<!-- include: ([^\s#]+)(?:#(.+?))? -->$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# Code, which has no links, or a link: its mark, text and target.
CODE_OR_LINK = re.compile(r"^```.*?^```$|`[^`]+`|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.M | re.S)

INLINE_CODE = re.compile(r"<code>[^<]*</code>")
SHAPE = r"(\[\*)(?=[,\]])"
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")

# What a browser fetches by itself, which links are not.
REMOTE = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=.?(?:https?:)?//[^>]*>"
    r"|<link\b(?![^>]*rel=.?(?:canonical|next|prev))[^>]*\bhref=.?(?:https?:)?//[^>]*>"
    r"|(?:@import\s|url\()[^;)]*//[^;)]*"
)


def pages() -> dict[str, str]:
    """Returns the Markdown of every page by its path in docs/, pages of the top folder first."""
    paths = sorted(DOCS.rglob("*.md"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(DOCS).as_posix(): path.read_text() for path in paths}


def expand(page: str, change: Callable[[str, str], str] = lambda text, source: text) -> str:
    """Returns a page's Markdown with the texts it includes, each after change(text, source)."""
    return INCLUDE.sub(lambda found: change(_read(found[1], found[2]), found[1]), page)


def _read(source: str, heading: str | None) -> str:
    path = ROOT / source
    if not path.is_file():
        raise ValueError(f"include: expected a file of the source tree, got {source}")
    text = path.read_text()
    if heading is None:
        return text.rstrip()
    # In a code block, a line that begins with # is a comment.
    masked = FENCED.sub(lambda block: re.sub("^#", " ", block[0], flags=re.MULTILINE), text)
    titles = list(re.finditer(r"^#+ (.*)$", masked, re.MULTILINE))
    for title, following in zip(titles, [*titles[1:], None], strict=True):
        if title[1] == heading:
            return text[title.end() : following.start() if following else None].strip("\n")
    raise ValueError(f"include: expected {source} to have a heading {heading!r}")


def homes() -> dict[str, str]:
    """Returns the page of each file in docs/ and of each included file.

    The latter is the first page that has the whole, else a part of it.
    """
    whole: dict[str, str] = {}
    part: dict[str, str] = {}
    for name, page in pages().items():
        for found in INCLUDE.finditer(page):
            (part if found[2] else whole).setdefault(found[1], name)
    return part | whole | {f"docs/{name}": name for name in pages()}


def _target(target: str, source: str) -> str | None:
    """Returns the path from the root of what a link of `source` leads to; None if not a file."""
    if re.match(r"[a-z]+:|#", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))
    if not (ROOT / path).exists():
        raise ValueError(f"include: expected the links of {source} to lead to files, got {target}")
    return path


def move_links(text: str, source: str, page: str, home: dict[str, str]) -> str:
    """Returns a text of the file `source` with its links as the page needs them."""

    def move(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path = _target(target, source) if target else None
        if path is None:
            return found[0]
        if mark or path in home:
            to = posixpath.relpath(f"files/{path}" if mark else home[path], posixpath.dirname(page))
            return f"{mark}[{words}]({to}{''.join(target.partition('#')[1:])})"
        if words.strip("`/") in path:
            return f"`{path}`"
        in_brackets = found.string[: found.start()].endswith("(")
        return f"{words}: `{path}`" if in_brackets else f"{words} (`{path}`)"

    return CODE_OR_LINK.sub(move, text)


def on_config(config: Any) -> Any:
    """Keeps the star of shapes such as [*, N, D], two of which in a sentence would be emphasis."""
    from markdown import Extension
    from markdown.inlinepatterns import SimpleTextInlineProcessor

    class Shapes(Extension):
        def extendMarkdown(self, md: Any) -> None:
            # After code (190), before links (170).
            md.inlinePatterns.register(SimpleTextInlineProcessor(SHAPE), "shape", 175)

    config["markdown_extensions"].append(Shapes())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures that included texts show."""
    from mkdocs.structure.files import File

    def add(text: str, source: str) -> str:
        for mark, _, target in CODE_OR_LINK.findall(text):
            path = _target(target, source) if mark else None
            if path and f"files/{path}" not in files.src_uris:
                files.append(File.generated(config, f"files/{path}", abs_src_path=ROOT / path))
        return text

    for page in pages().values():
        expand(page, add)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns the Markdown of a page with the texts that it includes."""
    home = homes()
    return expand(markdown, lambda text, source: move_links(text, source, page.file.src_uri, home))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page whose flags are marked, so that no line ends within `--dry-run`."""
    return INLINE_CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Returns a page as it is. Raises if it would load something from another host."""
    if found := REMOTE.search(output):
        raise ValueError(f"include: expected pages to load files of the site alone, got {found[0]}")
    return output
