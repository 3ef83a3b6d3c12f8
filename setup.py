r"""The page of the project on a package index: the README, with links that lead somewhere there too.

All else about the distribution is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PICTURE = re.compile(r"(!\[[^]]*\]\()(?!https?:|#)")
LINK = re.compile(r"(?<!!)(\[(?:[^]\[]|\[[^]]*\])*\]\()(?!https?:|#)")


def absolute(text: str, repository: str) -> str:
    r"""Returns Markdown whose links and pictures within the repository have whole addresses.

    Arguments:
        text: The Markdown.
        repository: The address of the repository.
    """
    text = PICTURE.sub(rf"\1{repository}/raw/main/", text)
    return LINK.sub(rf"\1{repository}/blob/main/", text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    address = project.get("urls", {}).get("Source")
    setup(
        long_description=absolute(readme, address) if address else readme,
        long_description_content_type="text/markdown",
    )
