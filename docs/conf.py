"""Sphinx settings."""

import sys
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst

from captum_idexpo import __version__

sys.path.insert(0, str(Path(__file__).parent))
import catalogue

catalogue.write(Path(__file__).parent / "attributions.rst")

project = "captum-idexpo"
author = "The captum-idexpo authors"
copyright = "2026, the captum-idexpo authors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"captum-idexpo {version}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
default_role = "any"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_google_docstring = True
nitpicky = False
suppress_warnings = [
    "ref.any",  # names of torch's and Captum's objects, which are not documented here
    "config.cache",  # the figure scraper below is a function
    "myst.header",  # the included results have no title of their own
]


def figure_scraper(block, block_vars, gallery_conf):
    """The figure that a tutorial's block assigned: this package returns figures and keeps none in pyplot."""
    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=120)
    return figure_rst([path], gallery_conf["src_dir"])


sphinx_gallery_conf = {
    "image_scrapers": (figure_scraper,),
    "examples_dirs": "../tutorials",
    "gallery_dirs": "auto_tutorials",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
}
