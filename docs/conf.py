r"""How the site is built: `python -m sphinx -W docs docs/_build/html`.

Nothing is fetched, neither by the build nor by its pages, unless `FLOWGUARD_DOCS_ONLINE=1` asks for links into other projects.
"""

import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from flowguard import __version__

HERE = Path(__file__).parent
ROOT = HERE.parent
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get(
    "urls", {}
)

project = "flowguard"
author = "The flowguard developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxarg.ext",  # the options of the commands, of their own parsers
    "reference",  # api/reference.py
]
sys.path.insert(0, str(HERE / "api"))
exclude_patterns = ["_build"]
highlight_language = "none"  # of blocks that name no language, such as trees of folders
suppress_warnings = []
if not (HERE / "api" / "index.md").exists():
    suppress_warnings.append("toc.not_readable")

# -- Pages and notebooks ---------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
smartquotes = False  # what is quoted here is mostly code
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell: each takes less than ten, if it has a core
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say of this machine's bars and fonts
copybutton_exclude = ".linenos, .gp, .go"

# -- The reference ---------------------------------------------------------------------------------

autodoc_member_order = "bysource"
# dingo brings its astronomy, which no page needs.
autodoc_mock_imports = [] if importlib.util.find_spec("dingo") else ["dingo"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_generate = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Arguments", "params_style")]

# Inventories lie on the net, and a build without it shall not fail: it names what it cannot link.
ONLINE = os.environ.get("FLOWGUARD_DOCS_ONLINE") == "1"
OTHERS = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
    "zuko": "https://zuko.readthedocs.io/stable",
    "lightning": "https://lightning.ai/docs/pytorch/stable",
    "sbi": "https://sbi.readthedocs.io/en/latest",
}
intersphinx_mapping = {name: (url, None) for name, url in OTHERS.items()} if ONLINE else {}
intersphinx_timeout = 10

# -- Formulas ----------------------------------------------------------------------------------------

html_math_renderer = "mathml"  # which browsers show without a script, and so without the net


def mathml(tex: str, block: bool) -> str:
    r"""Returns a formula as MathML.

    Arguments:
        tex: The formula, in LaTeX.
        block: Whether it stands on a line of its own.

    Raises:
        docutils.utils.math.MathError: If a command is none that docutils knows.
    """
    from docutils.utils.math.latex2mathml import tex2mathml

    tex = re.sub(r"\\dots(?![a-zA-Z])", r"\\ldots", tex)
    tex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", tex)
    return tex2mathml(tex, as_block=block)


def formula(writer: Any, node: Any) -> None:
    r"""Writes the node of a formula."""
    from docutils.nodes import SkipNode, math_block
    from docutils.utils.math import MathError
    from sphinx.util.logging import getLogger

    block = isinstance(node, math_block)
    tag = "div" if block else "span"
    try:
        shown = mathml(node.astext(), block)
    except MathError as error:
        getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        shown = writer.encode(node.astext())
    writer.body.append(f'<{tag} class="math notranslate nohighlight">{shown}</{tag}>')
    raise SkipNode


# -- Looks -----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"flowguard {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {}
if "Source" in URLS:
    html_theme_options |= {
        "source_repository": URLS["Source"],
        "source_branch": "main",
        "source_directory": "docs/",
    }

# -- Pages of the repository that are pages of the site too ------------------------------------------

#: Each of these pages shows a file from outside of this folder.
SHOWN = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "upstream": "upstream/README.md",
}
LINK = re.compile(r"(!?)\[((?:[^]\[]|\[[^]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def relinked(text: str, file: str, page: str, address: str | None = None) -> str:
    r"""Returns Markdown whose links to files of the repository lead somewhere on the site.

    Arguments:
        text: The Markdown.
        file: The file it comes from, from the root of the repository.
        page: The name of the page it is shown on.
        address: The address of the repository. Without one, files that are no pages are named only.
    """
    pages = {shown: f"{name}.md" for name, shown in SHOWN.items()} | {"README.md": "index.md"}

    def link(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups(default="")
        place = normpath(f"{Path(file).parent.as_posix()}/{target}")
        if "://" in target or place.startswith("..") or not (ROOT / place).exists():
            return found[0]
        inside = pages.get(place) or place.removeprefix("docs/")
        start = Path(page).parent.as_posix()
        if place == "README.md":  # the landing page has sections of its own
            anchor = ""
        if place in pages or place.startswith("docs/"):
            return f"{picture}[{label}]({relpath(inside, start)}{anchor})"
        if address:
            return f"{picture}[{label}]({address}/blob/main/{place}{anchor})"
        return label if "`" in label else f"`{label}`"

    return LINK.sub(link, text)


def read(app: Any, page: str, source: list[str]) -> None:
    r"""Puts in place of a page's source what it shows, with links that lead somewhere."""
    file = SHOWN.get(page, f"docs/{page}.md")
    if page in SHOWN:
        source[0] = (ROOT / file).read_text(encoding="utf-8")
    if (ROOT / file).exists():
        source[0] = relinked(source[0], file, page, URLS.get("Source"))


def leave(app: Any, env: Any, node: Any, content: Any) -> Any:
    r"""Leaves what is another project's as it is written, where no inventory tells its page."""
    root = node.get("reftarget", "").lstrip("~.").partition(".")[0]
    known = root in OTHERS or root in sys.stdlib_module_names or root in sys.modules
    foreign = root != "flowguard" and known
    return content if foreign else None


def setup(app: Any) -> None:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(formula, None), block_renderers=(formula, None)
    )
    app.connect("source-read", read)
    app.connect("missing-reference", leave, priority=900)  # after intersphinx
