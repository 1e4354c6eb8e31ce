"""The documentation as a site: `sphinx-build -W docs out/site`, or `make docs`."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert

import adacons_hvd

project = "adacons-hvd"
version = release = adacons_hvd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["deploy"]
html_theme = "furo"
html_title = f"adacons-hvd {release}"
html_show_copyright = False
# Furo's own fonts and scripts come with the site; nothing is fetched from elsewhere when it is read.
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "none"
# What adapters are made for, and what the stack does not have.
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_member_order = "bysource"
napoleon_google_docstring = True
html_math_renderer = "mathml"


def _show(self: Any, node: Any, display: str) -> None:
    from docutils.nodes import SkipNode

    self.body.append(convert(node.astext(), display=display))
    raise SkipNode


def _list_the_rest(app: Any, name: str, source: list[str]) -> None:
    """Add the pages that index.md does not name to its menu."""
    if name == app.config.root_doc:
        rest = sorted(page for page in app.env.found_docs - {name} if f"\n{page}\n" not in source[0])
        if rest:
            source[0] += "\n".join(["", "```{toctree}", ":caption: More", ":maxdepth: 1", "", *rest, "```", ""])


def setup(app: Any) -> None:
    """Formulas as MathML, which browsers show without a script."""
    app.connect("source-read", _list_the_rest)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _show(self, node, "inline"), None),
        block_renderers=(lambda self, node: _show(self, node, "block"), None),
    )
