"""How Sphinx builds docs/ into a site: `make docs`."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "mohawk"
author = "the mohawk developers"
copyright = f"2026, {author}"
release = re.search(r'__version__ = "(.*)"', (ROOT / "mohawk" / "__init__.py").read_text())[1]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
nitpicky = True
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"mohawk {release}"
html_show_sphinx = False
pygments_style = "friendly"


def contents(text: str) -> str:
    """Sphinx's list of pages, made of the links of index.md, under its headings."""
    made = []
    for caption, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        pages = re.findall(r"^- \[[^]]*\]\((\w[\w-]*)\.md\)", body, re.M)
        made.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(made)


def whole(name: str) -> str:
    """A page of the repository's root as one of docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)", "](../", text)
    return text.replace("](../docs/", "](")


def read(app, docname: str, source: list[str]) -> None:
    """What a page is before it is parsed: the two that the forge shows at the root are taken from there."""
    # Markdown elsewhere in the repository is no page of the site: it is offered as a file
    source[0] = re.sub(r"\]\((\.\./(?!CONTRIBUTING|CHANGELOG)[^)#]*\.md)\)", r"](path:\1)", source[0])
    if docname == "index":
        source[0] += "\n" + contents(source[0])
    elif docname in ("contributing", "changelog"):
        source[0] = whole({"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}[docname])


def setup(app) -> None:
    app.connect("source-read", read)
