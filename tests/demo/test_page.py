r"""Pages: what is escaped, what is named, and what a narrow screen or a reader of alt texts gets."""

from html.parser import HTMLParser

import pytest

from flowguard.demo.page import Drawn, card, document, figures, folded, media_type, table

PNG = b"\x89PNG\r\n\x1a\n"
ODD = '<b>&"'


class Seen(HTMLParser):
    r"""Creates a reader of a page that keeps the attributes of its tags."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_a_page_fits_the_screen_that_it_is_on():
    seen = Seen(document("title", ""))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in seen.of(
        "meta"
    )
    assert "prefers-color-scheme: dark" in document("title", "")


def test_tables_have_captions_and_heads():
    seen = Seen(table([["name", "value"], ["a", "1"]], "what it tells"))
    assert len(seen.of("caption")) == 1
    assert [a["scope"] for a in seen.of("th")] == ["col", "col", "row"]
    assert seen.of("div")[0]["tabindex"] == "0"  # it scrolls by the keyboard too


@pytest.mark.parametrize(
    "made",
    [
        document(ODD, "", ODD),
        table([[ODD, ODD], [ODD, ODD]], ODD),
        card(ODD, ODD, [Drawn(PNG, ODD, ODD, ODD)]),
        folded(ODD, ""),
        figures([Drawn(PNG, ODD, ODD)]),
    ],
    ids=["document", "table", "card", "folded", "figures"],
)
def test_words_are_escaped(made):
    assert "<b>" not in made
    assert "&lt;b&gt;&amp;" in made
    for _, attrs in Seen(made).tags:
        assert "b" not in attrs


def test_pictures_of_a_card_have_one_size():
    seen = Seen(
        card("x", "y", [Drawn(PNG, "a", "b"), Drawn(PNG, "c", "d", pixels=True)], (30, 45))
    )
    assert [a["style"] for a in seen.of("img")] == ["aspect-ratio: 45 / 30"] * 2


def test_maps_name_their_quantiles():
    made = figures([Drawn(PNG, "a", "b", colours=True)])
    for quantile in ("0.9", "0.99", "0.999", "0.9999"):
        assert f"<span>{quantile}</span>" in made
    assert "<span>0.9</span>" not in figures([Drawn(PNG, "a", "b")])


def test_pages_without_sides_run_no_script():
    assert "<script>" not in document("x", card("a", "b", [Drawn(PNG, "c", "d")]))
    sides = [Drawn(PNG, "c", "d", "left"), Drawn(PNG, "c", "d", "right")]
    assert "<script>" in document("x", card("a", "b", sides))


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="must be PNG, JPEG or WebP; got b'GIF8'"):
        media_type(b"GIF89a")
