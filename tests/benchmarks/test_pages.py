"""Tests for the pages that benchmarks write into."""

import doctest

import pages
import pytest

PAGE = "Before.\n\n<!-- a:start -->\nold\n<!-- a:end -->\n\nBetween.\n\n<!-- b:start --><!-- b:end -->"


def test_the_examples_of_pages_hold():
    assert doctest.testmod(pages).failed == 0


def test_only_what_lies_between_the_markers_is_replaced():
    new = pages.between(PAGE, "a", "new\n")
    assert new == PAGE.replace("old", "new")
    assert pages.between(new, "a", "new") == new
    assert pages.between(PAGE, "b", "x").endswith("<!-- b:start -->\nx\n<!-- b:end -->")


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "<!-- a:start -->",
        "<!-- a:end --> <!-- a:start -->",
        "<!-- a:start --><!-- a:start --><!-- a:end -->",
        "<!-- a:start --><!-- a:end --><!-- a:end -->",
    ],
)
def test_a_page_without_both_markers_once_is_refused(text):
    with pytest.raises(ValueError, match=r"must hold the markers <!-- a:start -->.*; got"):
        pages.between(text, "a", "new")


def test_a_part_is_written_into_its_file(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    pages.write_part(file, "a", "κ ≤ 1")
    assert file.read_text(encoding="utf-8") == PAGE.replace("old", "κ ≤ 1")
