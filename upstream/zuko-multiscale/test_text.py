import re
from pathlib import Path

import pytest
import torch

zuko = pytest.importorskip("zuko")


def test_the_code_of_the_text_runs():
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8").replace("> ", "")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(code.replace("\n>\n", "\n\n"), names)
    flow, maps, x = names["flow"], names["maps"], names["x"]
    assert isinstance(flow, zuko.lazy.LazyDistribution)
    assert isinstance(flow(maps), zuko.distributions.NormalizingFlow)
    assert flow(maps).log_prob(x).shape == (4,)
    assert flow(maps, temperature=0.8).sample((5,)).shape == (5, 4, 3, 16, 24)
