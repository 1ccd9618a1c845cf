"""The site: the Markdown of this repository, as it stands, in one tree.

``make docs`` builds it from the root of the checkout, so that a link between two files
is the same link here, on a code host and in an editor. Nothing is fetched and nothing
is run: ``tests/docs`` runs every block, and the notebook is kept with what it printed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import shardinit

project = "shardinit"
author = "the shardinit authors"
release = version = shardinit.__version__
root_doc = "docs/index"
include_patterns = ["docs/**", "*.md", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "node_modules", "shardinit", "tests"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args of a docstring say it
autodoc_preserve_defaults = True
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = f"shardinit {release}"
html_copy_source = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # a second search
    "show_toc_level": 2,
}

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#\s]+)\)")


def _without_links_to_code(app: Any, docname: str, source: list[str]) -> None:
    """Links to code and folders become their text: the site has pages only."""
    folder = Path(app.env.doc2path(docname)).parent

    def text_of(link: re.Match[str]) -> str:
        target = folder / link[2]
        is_page = target.suffix in (".md", ".ipynb")
        return link[1] if target.exists() and not is_page else link[0]

    source[0] = _LINK.sub(text_of, source[0])


def _with_an_entrance(app: Any, error: Exception | None) -> None:
    """A page at the top that leads to the first one."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url={}">\n'
        target = app.builder.get_target_uri(root_doc)
        (Path(app.outdir) / "index.html").write_text(page.format(target))


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _without_links_to_code)
    app.connect("build-finished", _with_an_entrance)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
