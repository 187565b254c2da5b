"""Sphinx's settings for the site (``make docs``): Markdown pages, docstrings, and the table of settings."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from shoal.deploy.docs.settings_reference import MARKER, settings_reference

ROOT = Path(__file__).resolve().parents[2]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "shoal"
author = "the shoal authors"
version = release = _PROJECT["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["pictures/*.json"]

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"shoal {version}"
html_static_path = ["static"]
html_css_files = ["shoal.css"]
html_show_sourcelink = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Called by Sphinx before it reads the pages."""
    app.connect("source-read", _add_settings)
    app.connect("include-read", _unlink)
    app.connect("autodoc-process-docstring", _take_stars_literally)


def _add_settings(app: Any, page: str, source: list[str]) -> None:
    source[0] = source[0].replace(MARKER, settings_reference())


def _unlink(app: Any, path: Path, page: str, content: list[str]) -> None:
    """Files outside the site, which an included file links to, are named instead."""
    folder = Path(path).parent

    def named(link: re.Match[str]) -> str:
        return f"{link[1]} (`{os.path.relpath(folder / link[2], ROOT)}`)"

    content[0] = re.sub(r"\[([^]]+)\]\((?!\w+:|#)([^)#]+)[^)]*\)", named, content[0])


def _take_stars_literally(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``[N, *obs]`` is a shape; docstrings here emphasize nothing."""
    lines[:] = [re.sub(r"(?<![*`])\*(?=\w)", r"\\*", line) for line in lines]
