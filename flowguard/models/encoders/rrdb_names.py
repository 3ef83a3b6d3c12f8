r"""The names that the weights of RRDB networks have had."""

__all__ = ["published_names"]

import re
from collections.abc import Iterable

from flowguard.models.checkpoints import CheckpointError

#: BasicSR's names, as in Real-ESRGAN, and the published ones.
BASICSR = {
    r"conv_first\.": "conv_first.",
    r"body\.(\d+)\.rdb(\d)\.conv(\d)\.": r"RRDB_trunk.\1.RDB\2.conv\3.",
    r"conv_body\.": "trunk_conv.",
    r"conv_up(\d+)\.": r"upconv\1.",
    r"conv_hr\.": "HRconv.",
    r"conv_last\.": "conv_last.",
}
OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.")
OLD_TRUNK = re.compile(r"model\.1\.sub\.(\d+)\.(?=weight$|bias$)")
OLD = re.compile(r"model\.(\d+)\.(?=weight$|bias$)")


def published_names(keys: Iterable[str], label: str) -> tuple[dict[str, str], str | None]:
    r"""Returns the published name of each key, and where the long skip of such a network starts.

    Known are the published names themselves, as of ESRGAN and SRFlow (``RRDB_trunk.0.RDB1``),
    those of BasicSR and Real-ESRGAN (``body.0.rdb1``), and those of the first ESRGAN
    (``model.1.sub.0.RDB1``). A key that is none of these keeps its name.

    Arguments:
        keys: The names of the tensors.
        label: What to call the checkpoint in messages.

    Returns:
        The names by the keys, and ``"first"``, or :py:`None` where the names do not tell: SRFlow
        took over those of ESRGAN, and lost its long skip.

    Raises:
        CheckpointError: If the layers of the first ESRGAN are not numbered as it has them.

    Example:
        >>> published_names(["body.2.rdb1.conv5.bias", "conv_hr.bias"], "the checkpoint")[0]
        {'body.2.rdb1.conv5.bias': 'RRDB_trunk.2.RDB1.conv5.bias', 'conv_hr.bias': 'HRconv.bias'}
    """
    keys = list(keys)
    if any(k.startswith("model.1.sub.") for k in keys):
        return _old(keys, label), "first"
    if any(k.startswith("body.") for k in keys):
        return {k: _basicsr(k) for k in keys}, "first"
    return {k: k for k in keys}, None


def _basicsr(key: str) -> str:
    for pattern, name in BASICSR.items():
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def _old(keys: list[str], label: str) -> dict[str, str]:
    r"""The first ESRGAN numbers the parts of a chain: first convolution, trunk, doublings, head."""
    numbers = sorted({int(found[1]) for k in keys if (found := OLD.match(k))})
    doublings = len(numbers) - 3
    # A doubling is three parts, upsampling, convolution, activation; so the head starts after.
    parts = {0: "conv_first", 2 + 3 * doublings: "HRconv", 4 + 3 * doublings: "conv_last"}
    parts |= {3 * i: f"upconv{i}" for i in range(1, doublings + 1)}
    if doublings < 0 or sorted(parts) != numbers:
        raise CheckpointError(
            f"{label} is no ESRGAN network of the first kind: beside its trunk it must have"
            f" convolutions model.0, model.3 and so on for each doubling, and two for the head; it"
            f" has model.{', model.'.join(map(str, numbers))}"
        )
    names = {}
    for k in keys:
        name = OLD_BLOCK.sub(r"RRDB_trunk.\1.RDB\2.conv\3.", k)
        name = OLD_TRUNK.sub("trunk_conv.", name)
        names[k] = OLD.sub(lambda found: f"{parts[int(found[1])]}.", name)
    return names
