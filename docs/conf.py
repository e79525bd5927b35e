"""Sphinx: how the site is made. tools/docs builds it; nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import vfiopy

project = "vfiopy"
copyright = "the authors of vfiopy"  # noqa: A001  Sphinx's name for it
release = vfiopy.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "tools._docs.references",
    "tools._docs.generated",
]

myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_default_options = {
    # what a class has from the library's own bases is its own; what it has from these, everybody knows
    "inherited-members": "object,OSError,BaseException,int,tuple,str,Enum,ndarray,Protocol",
}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"vfiopy {release}"
html_static_path = ["_static"]
html_css_files = ["vfiopy.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
