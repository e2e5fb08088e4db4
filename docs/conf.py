"""The documentation as a site: ``make docs``.

The source is the whole repository, so that links between its Markdown files hold on the site as they do on a code host.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import impasto  # noqa: E402

project = "Impasto"
copyright = "the authors of Impasto"
release = version = impasto.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_extension"]

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "examples/*/README.md"]
exclude_patterns = [".*", "out", "runs", "src", "tests", "benchmarks", "scripts", "**/__pycache__"]

myst_heading_anchors = 4  # links to headings are checked
highlight_language = "bash"  # of indented blocks, which are commands

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80  # longer ones have a parameter per line
python_use_unqualified_type_names = True
add_module_names = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "Impasto"
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "to_docs.html"}  # the pages keep the paths of the repository
templates_path = ["templates"]
