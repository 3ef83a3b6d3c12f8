r"""What became of pictures, from one process to another."""

import json
import math
from pathlib import Path

import pytest

from flowguard.cli.outcomes import Outcome, packed, unpacked
from flowguard.demo.page import Drawn
from flowguard.io.atomic import write_json

OUTCOMES = {
    "written": Outcome(
        Path("a.png"),
        (Path("out/a-1.png"), Path("out/a-2.png")),
        size=(8, 6),
        seconds=1.5,
        p_value=0.25,
        flagged=True,
        artefacts=0.125,
        excess=2.5,
        calibration=400,
        pictures=[Drawn(b"\x89PNG\xff", "input", "the picture", side="input", pixels=True)],
    ),
    "failed": Outcome(Path("a.png"), (Path("a"),), "failed", "it is no picture"),
    "an odd name": Outcome(Path("a\udcff\n.png"), ()),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_go_through_a_file(name, tmp_path):
    write_json(tmp_path / "x.json", packed(OUTCOMES[name]))
    assert unpacked(json.loads((tmp_path / "x.json").read_text())) == OUTCOMES[name]


def test_a_number_that_json_lacks(tmp_path):
    write_json(tmp_path / "x.json", packed(Outcome(Path("a"), (), p_value=math.nan)))
    assert math.isnan(unpacked(json.loads((tmp_path / "x.json").read_text())).p_value)
