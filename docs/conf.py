"""The site: README, pages, tutorials and API, as ``make docs`` builds it.

    python -m sphinx -W docs docs/_build/html

Notebooks are shown as they were stored; nothing is run.
"""

import sys
from pathlib import Path

import lvxattn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "LV-XAttn"
author = "The LV-XAttn developers"
version = release = lvxattn.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "repository",
]
exclude_patterns = ["_build", "tutorials/data", "tutorials/*.py"]

html_theme = "furo"
html_title = "LV-XAttn"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["code.css"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Docstrings have plain backticks around names and code.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "groupwise"}
autodoc_typehints = "none"
# A default as its source says it, not as Python prints the object.
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = False
# As parameters, so that "s_q, s_kv : tuple" names two of them.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
napoleon_preprocess_types = False

# A docstring says `Layout`; reference and torch_impl have one each.
suppress_warnings = ["ref.python"]
