"""The poster."""

from xml.etree import ElementTree

import poster


def test_the_poster_is_that_of_its_command_and_its_pictures_say_what_they_show():
    file = poster.ROOT / "docs" / "images" / "poster.svg"
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    images = root.findall("{http://www.w3.org/2000/svg}image")
    assert len(images) == 2
    assert all(image.get("aria-label") for image in images)
    told = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    drawn = ElementTree.fromstring(poster.poster())
    assert told == [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert file.stat().st_size < 1e6
