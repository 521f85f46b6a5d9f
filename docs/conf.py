"""Configuration of the documentation: `sphinx-build -W docs build/docs` draws, executes and writes all of it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also of the kernels that execute the pages
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

project = "pbjax"
author = "pbjax developers"
project_copyright = "pbjax developers"
release = importlib.metadata.version("pbjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    # in docs/extensions
    "docstrings",
    "figures",
    "mathml",
    "readme",
]
exclude_patterns = ["_generated", "extensions"]

# Pages: Markdown, whose cells are executed in each build. A cell that raises fails it.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_in_temp = True  # pages may write files
nb_merge_streams = True

# Reference: signatures as they are written, descriptions from the docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which annotations cannot
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Cost", "params_style")]

html_theme = "furo"
html_title = f"pbjax {release}"
html_static_path = ["static"]
html_css_files = ["pbjax.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
