"""docs/include.py, the hook of the site, and what the pages name. `make docs` builds the site."""

import re
from pathlib import Path

import pytest
from page_blocks import DOCS, ROOT, load_include

import himo
import himo_kernels

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")

include = load_include() if DOCS.is_dir() else None


def test_a_section_ends_at_the_next_heading_and_a_comment_is_no_heading() -> None:
    readme = (ROOT / "README.md").read_text()
    install = include.expand("<!-- include: README.md#Install -->")
    assert install in readme and install.startswith("```bash\n") and "## " not in install
    backend = include.expand("<!-- include: CONTRIBUTING.md#Add a backend to an operator -->")
    assert backend.count("```python") == 2  # their comments begin with #


def test_a_whole_file_is_included() -> None:
    text = (ROOT / "himo_kernels/pca/README.md").read_text()
    page = "before\n<!-- include: himo_kernels/pca/README.md -->\nafter"
    assert include.expand(page) == f"before\n{text.rstrip()}\nafter"


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("[a](../pca/README.md)", "[a](pca.md)"),
        ("[a](../pca/README.md#precision)", "[a](pca.md#precision)"),
        ("[a](../distributed/README.md)", "[a](../ranks.md)"),
        ("[a](#here), [b](https://arxiv.org/abs/2511.06653)", None),
        ("[that file](api.py)", "that file (`himo_kernels/info_nce/api.py`)"),
        ("([rows](api.py))", "(rows: `himo_kernels/info_nce/api.py`)"),
        ("[table](../../docs/paper.md)", "[table](../paper.md)"),
        ("[api.py](api.py)", "`himo_kernels/info_nce/api.py`"),
        (
            "![a](../../benchmarks/results/cpu/demo.png)",
            "![a](../files/benchmarks/results/cpu/demo.png)",
        ),
        ("`[a](nowhere.md)`", None),
        ("```text\n[a](nowhere.md)\n```", None),
    ],
)
def test_links_of_an_included_text_lead_to_the_same_place(text: str, moved: str | None) -> None:
    source = "himo_kernels/info_nce/README.md"
    page = "operators/info_nce.md"
    assert include.move_links(text, source, page, include.homes()) == (moved or text)


def test_no_line_of_a_page_ends_within_a_flag() -> None:
    plain = "<p>Take --a, <code>a-b</code> and <pre><span>--c</span></pre>"
    assert include.on_page_content(plain, None, None, None) == plain
    marked = include.on_page_content("<code>himo --dry-run -m x-y</code>", None, None, None)
    first, second = (f'<span class="flag">{flag}</span>' for flag in ("--dry-run", "-m"))
    assert marked == f"<code>himo {first} {second} x-y</code>"


def test_a_link_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the links of README.md .* got nowhere.md"):
        include.move_links("[a](nowhere.md)", "README.md", "index.md", {})


def test_a_readme_leads_to_the_page_that_has_it_all() -> None:
    homes = include.homes()
    assert homes["himo_kernels/covariance/README.md"] == "operators/covariance.md"
    assert homes["README.md"] in include.pages()


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://host/x.js"></script>',
        "<script defer src=//host/x.js></script>",
        '<link rel="stylesheet" href="https://host/x.css">',
        '<img alt="a" src="http://host/x.png">',
        "<style>@import 'https://host/x.css';</style>",
        "<style>a { background: url(https://host/x.png) }</style>",
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="expected pages to load files of the site alone"):
        include.on_post_page(f"<html><head>{tag}</head></html>", None, None)


def test_links_to_other_hosts_are_no_loads() -> None:
    page = (
        '<link rel="canonical" href="https://host/"><a href="https://host/">a</a><img src="x.png">'
    )
    assert include.on_post_page(page, None, None) == page


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == set(include.pages())


@pytest.mark.parametrize("module", [himo_kernels, himo], ids=lambda module: module.__name__)
def test_the_api_reference_has_every_public_name(module) -> None:
    page = (DOCS / "api" / f"{module.__name__}.md").read_text()
    named = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert set(module.__all__) - {"__version__", "nn"} <= named
    assert {"HiDe", "HiMoLoss", "Terms"} <= named or module is himo


def test_every_operator_has_a_page() -> None:
    families = {path.parent.name for path in Path(ROOT, "himo_kernels").glob("*/README.md")}
    pages = {path.stem for path in (DOCS / "operators").glob("*.md")} - {"index"}
    assert families - {"distributed", "integrations"} == pages
