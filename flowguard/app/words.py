r"""What the page says."""

__all__ = ["artefacts", "certificate", "chance"]

import math

from flowguard.bounds import Certificate
from flowguard.demo.report import number
from flowguard.ood import OODReport

#: The largest noise that the line of the certificate is for: two in 10⁹ normal numbers lie beyond.
NOISE = 6.0


def chance(report: OODReport | None) -> str:
    r"""Returns the p-value of one condition in words.

    Arguments:
        report: The report; :py:`None` of a model whose guard is not calibrated.
    """
    if report is None:
        return (
            "The guard of this model is not calibrated, so that it tells nothing of the condition:"
            " model.conditioner.fit and .calibrate do it."
        )
    if bool(report.non_finite[0]):
        return (
            "Out of distribution: the condition, or what the encoder makes of it, is not finite."
        )
    p, count = float(report.p_value[0]), _count(report)
    least = len(report.levels) / (count + 1)
    if p <= least * (1 + 1e-6) and least < 0.5:
        how = f"none of the {count} conditions that the guard was calibrated with is as strange"
    else:
        how = f"{_share(p)} conditions like those of training are as strange as this one, or stranger"
    if bool(report.flagged[0]):
        return f"Out of distribution: p = {p:.2g}; {how}."
    if p < 0.05:
        return f"Unusual, but not flagged: p = {p:.2g}; {how}."
    return f"In distribution: p = {p:.2g}; {how}."


def _count(report: OODReport) -> int:
    return min(len(level.calibration.scores) for level in report.levels.values())


def _share(p: float) -> str:
    if p >= 0.995:
        return "nearly all"
    return f"about {100 * p:.0f} in 100" if p >= 0.01 else f"about 1 in {1 / p:,.0f}"


def certificate(made: Certificate, *, added: bool = False) -> str:
    r"""Returns a certificate as one line.

    Arguments:
        made: The certificate of an image model.
        added: Whether what it bounds is added to the condition, which nothing bounds.
    """
    if not made.certified:
        reason = made.refused[0].reason or "a layer is not bounded"
        return f"Certificate: none, for no bound holds for all conditions ({reason})."
    what = "what is added to the enlarged condition" if added else "a value of a sample"
    return (
        f"Certificate: {what} never exceeds {made.bound(NOISE):.4g} in absolute value, whatever"
        f" the condition is, for noise up to {NOISE:g}."
    )


def artefacts(share: float, largest: float) -> str:
    r"""Returns how many pixels of a sample are artefacts, and its largest value.

    Arguments:
        share: The share of its pixels that are.
        largest: Its largest absolute value; infinite if one is not finite.

    Example:
        >>> artefacts(0.125, 1e9)
        '12.5 % artefacts; largest value 1e+09'
        >>> artefacts(0.0, 1.02)
        'no artefacts; largest value 1.02'
    """
    count = f"{100 * share:.3g} % artefacts" if share else "no artefacts"
    if math.isinf(largest):
        return f"{count}; some values are not finite"
    return f"{count}; largest value {number(largest)}"
