r"""How pages of the repository become pages of the site."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"
CONF = runpy.run_path(str(DOCS / "conf.py"))
REPOSITORY = "https://example.org/flowguard"


@pytest.mark.parametrize(
    ("link", "file", "page", "shown"),
    [
        ("[a](docs/ood.md#x)", "CONTRIBUTING.md", "contributing", "[a](ood.md#x)"),
        ("[a](upstream/README.md)", "CONTRIBUTING.md", "contributing", "[a](upstream.md)"),
        ("[a](../CHANGELOG.md)", "docs/ood.md", "ood", "[a](changelog.md)"),
        (
            "[a](../guarantees.md)",
            "docs/experiments/toy.md",
            "experiments/toy",
            "[a](../guarantees.md)",
        ),
        ("[a](../README.md#speed)", "docs/speed.md", "speed", "[a](index.md)"),
        ("![a](images/headline.png)", "docs/ood.md", "ood", "![a](images/headline.png)"),
        ("[a](../examples/sbi_protect.py)", "docs/sbi.md", "sbi", "`a`"),
        ("[`a`](zuko-broadcast)", "upstream/README.md", "upstream", "`a`"),
        (
            "[a](https://example.org/docs/ood.md)",
            "README.md",
            "index",
            "[a](https://example.org/docs/ood.md)",
        ),
        ("x[0](y)", "docs/ood.md", "ood", "x[0](y)"),
    ],
)
def test_links_lead_to_pages_of_the_site(link, file, page, shown):
    assert CONF["relinked"](link, file, page) == shown


def test_files_that_are_no_pages_are_linked_where_the_repository_has_an_address():
    shown = CONF["relinked"]("[a](../examples/sbi_protect.py)", "docs/sbi.md", "sbi", REPOSITORY)
    assert shown == f"[a]({REPOSITORY}/blob/main/examples/sbi_protect.py)"


def test_a_page_that_shows_a_file_is_that_file():
    for page, file in CONF["SHOWN"].items():
        assert f"](../{file})" in (DOCS / f"{page}.md").read_text(encoding="utf-8")
        source = ["stub"]
        CONF["read"](None, page, source)
        title = (DOCS.parent / file).read_text(encoding="utf-8").splitlines()[0]
        assert source[0].startswith(title)


@pytest.mark.parametrize(
    ("target", "left"),
    [
        ("torch.nn.Module", True),
        ("collections.abc.Iterator", True),
        ("~numpy.ndarray", True),
        ("flowguard.nothing", False),
        ("nothing.of.ours", False),
    ],
)
def test_references_into_other_projects_are_left_and_our_own_are_missed(target, left):
    content = object()
    found = CONF["leave"](None, None, {"reftarget": target}, content)
    assert (found is content) == left


def test_nothing_is_fetched_unless_asked_for(monkeypatch):
    assert CONF["intersphinx_mapping"] == {}
    monkeypatch.setenv("FLOWGUARD_DOCS_ONLINE", "1")
    asked = runpy.run_path(str(DOCS / "conf.py"))["intersphinx_mapping"]
    assert set(asked) == set(CONF["OTHERS"])


@pytest.mark.parametrize(
    "tex", [r"P + \dots", r"\max(B, |z| + \beta). \tag{1}", r"\lVert x \rVert_2"]
)
def test_formulas_are_mathml(tex):
    latex2mathml = pytest.importorskip("docutils.utils.math.latex2mathml")
    shown = CONF["mathml"](tex, block=True)
    assert shown.startswith("<math")
    with pytest.raises(latex2mathml.MathError):
        CONF["mathml"](r"\nothing", block=False)


def test_the_last_handler_is_asked_after_that_of_inventories():
    handlers = {}

    def connect(event, handler, priority=500):
        handlers[event] = priority

    CONF["setup"](SimpleNamespace(connect=connect, add_html_math_renderer=lambda *a, **k: None))
    assert handlers == {"source-read": 500, "missing-reference": 900}
