"""Sphinx settings."""

import re
import sys
import zlib
from pathlib import Path

from docutils import nodes
from sphinx.ext import autosummary
from sphinx_gallery.scrapers import figure_rst
from sphinx_gallery.sorting import ExplicitOrder

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
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"captum-idexpo {version}"
html_logo = html_favicon = "_static/logo.svg"
ACCENT = {"light": "#a52c60", "dark": "#f98e52"}  # of the maps' colours, with enough contrast to the page
html_theme_options = {
    f"{mode}_css_variables": {
        "code-font-size": "77%",  # docstrings' examples fit the column
        "color-brand-primary": accent,
        "color-brand-content": accent,
        "color-brand-visited": accent,
        "sd-color-card-border-hover": accent,
    }
    for mode, accent in ACCENT.items()
}
html_static_path = ["_static"]
html_css_files = ["custom.css"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
default_role = "any"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autosummary_generate = False
autosummary.WELL_KNOWN_ABBREVIATIONS += ("eq.", "sec.")  # which end no sentence in the tables
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
nitpicky = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = [
    "ref.any",  # names of torch's and Captum's objects, which are not documented here
    "config.cache",  # the figure scraper below is a function
    "myst.header",  # the included results have no title of their own
]


def offline_inventory() -> str:
    """An inventory of nothing: without a network, names of other projects are printed and not linked."""
    header = b"# Sphinx inventory version 2\n# Project: none\n# Version: 0\n# The rest is compressed by zlib.\n"
    path = Path(__file__).parent / "_build" / "offline.inv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header + zlib.compress(b""))
    return str(path)


intersphinx_timeout = 5
intersphinx_mapping = {
    name: (url, (None, offline_inventory()))
    for name, url in {
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
        "captum": "https://captum.ai/api",
        "numpy": "https://numpy.org/doc/stable",
        "sklearn": "https://scikit-learn.org/stable",
    }.items()
}


def keep_numbers_together(app, document):
    """A number and its standard error stay on one line."""
    for text in [text for text in document.findall(nodes.Text) if " ± " in text]:
        text.parent.replace(text, nodes.Text(text.replace(" ± ", "\u00a0±\u00a0")))


def leave_folders_out(app, docname, source):
    """Warnings in a tutorial's output name their file, without the folders of the machine that made the page."""
    if docname.startswith("auto_tutorials"):
        source[0] = re.sub(r"(?<![\w/])/(?:[^\s/]+/)+(?:site-packages|tutorials)/", "", source[0])


def setup(app):
    """Sphinx calls this."""
    app.connect("doctree-read", keep_numbers_together)
    app.connect("source-read", leave_folders_out)


def figure_scraper(block, block_vars, gallery_conf):
    """The figure that a tutorial's block assigned: this package returns figures and keeps none in pyplot."""
    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=120)
    return figure_rst([path], gallery_conf["src_dir"])


# In this order; the other pages of a section follow by name.
FIRST_TUTORIALS = (
    "quickstart",
    "gradcam_images",
    "right_reasons",
    "masks_and_jury",
    "evaluate_captum",
    "table_lime_kernel_shap",
)

sphinx_gallery_conf = {
    "image_scrapers": (figure_scraper,),
    "examples_dirs": "../tutorials",
    "gallery_dirs": "auto_tutorials",
    "subsection_order": ExplicitOrder([f"../tutorials/{name}" for name in ("images", "tables_and_text", "guides")]),
    "within_subsection_order": ExplicitOrder([f"plot_{name}.py" for name in FIRST_TUTORIALS] + ["*"]),
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # pages that need a script from elsewhere
    "remove_config_comments": True,  # which figure is the thumbnail is no reader's business
}
