r"""The fitted and calibrated levels of an encoder: what conditioner and monitor share."""

__all__ = ["Level", "LevelSet", "Statistic"]

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowguard._version import __version__
from flowguard.ood.calibration import STATISTICS, Calibration, Calibrator, image_statistics
from flowguard.ood.errors import NotFittedError
from flowguard.ood.frame import Depths, Frame
from flowguard.ood.gaussian import Shrinkage, StreamingGaussian, pull
from flowguard.ood.report import LevelReport, OODReport
from flowguard.ood.sample import Sample, SampledScores
from flowguard.ood.state import gather

#: The name of one of :data:`flowguard.ood.calibration.STATISTICS`.
Statistic = Literal["mean", "max", "share"]

MAPS = "maps (N, C, H, W)"


class Level(nn.Module):
    r"""Creates one level, a Gaussian, its frame and its calibration, all empty.

    Arguments:
        normalize: See :class:`StreamingGaussian`.
    """

    def __init__(self, normalize: Literal["l2"] | None) -> None:
        super().__init__()
        self.gaussian = StreamingGaussian(normalize=normalize)
        self.frame = Frame()
        self.calibration = Calibration()
        self.sample: Sample | None = None  # of maps, during the fit

    def finalize(self, shrinkage: Shrinkage, distributed: bool) -> None:
        r"""Ends the fit.

        Arguments:
            shrinkage: See :meth:`StreamingGaussian.finalize`.
            distributed: Whether the ranks are merged first.
        """
        if distributed:
            self.gaussian.merge_ranks()
        self.gaussian.finalize(shrinkage)
        if self.sample is None:
            return
        sampled, self.sample = self.sample.scores(self.gaussian), None
        if distributed:
            sampled = SampledScores.union(SampledScores(*part) for part in gather(sampled))
        places = Depths(sampled.depth, sampled.inside)
        device = self.gaussian.mean.device
        self.frame.fit(sampled.scores, places)
        ratios = torch.cat([self.frame.ratios, torch.ones(1, dtype=torch.float64)])
        even = sampled.scores / ratios[places.depth.clamp_max(len(ratios) - 1)]
        self.calibration.edge = even.quantile(0.99)
        self.frame.to(device)
        self.calibration.to(device)

    def scores(self, features: Tensor) -> Tensor:
        r"""Returns the squared distance of each vector; of pixels, with the frame evened out.

        Arguments:
            features: The features, with shape :math:`(N, C)` or :math:`(N, C, H, W)`.
        """
        scores = self.gaussian.mahalanobis(features)
        ratios = self.frame.of(scores)
        return scores if ratios is None else scores.div_(ratios)

    def pull(self, features: Tensor, scores: Tensor, boundary: float) -> Tensor:
        r"""Moves what lies beyond a boundary of the scores onto it; see :func:`pull`.

        Arguments:
            features: The features.
            scores: What :meth:`scores` made of them.
            boundary: The boundary.
        """
        return pull(features, scores, self.gaussian, boundary, self.frame.of(scores))


class LevelSet(nn.Module):
    r"""Creates the levels of an encoder, empty until they are fitted.

    The levels are made when the first batch, or a saved state, tells their names and sizes. The
    names, the fingerprint of the encoder and the version travel as bytes in a tensor, so that
    ``torch.load(weights_only=True)`` and safetensors can hold the state.

    Arguments:
        shrinkage: See :meth:`StreamingGaussian.finalize`.
        normalize: See :class:`StreamingGaussian`.
        statistic: What an image is judged by.

    Raises:
        ValueError: If an option is out of range.
    """

    levels: nn.ModuleList

    def __init__(
        self,
        shrinkage: Shrinkage = "oas",
        normalize: Literal["l2"] | None = None,
        statistic: Statistic = "mean",
    ) -> None:
        super().__init__()
        if statistic not in STATISTICS:
            raise ValueError(
                f"statistic must be one of {', '.join(STATISTICS)}; got {statistic!r}"
            )
        if isinstance(shrinkage, str) and shrinkage not in ("oas", "ledoit_wolf"):
            raise ValueError(
                f"shrinkage must be 'oas', 'ledoit_wolf' or a number in [0, 1]; got {shrinkage!r}"
            )
        StreamingGaussian(normalize=normalize)  # checks it now, and not at the first fit
        self.shrinkage = shrinkage
        self.normalize = normalize
        self.statistic = statistic
        self.levels = nn.ModuleList()
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.fingerprint = ""
        self.edges_of_fit = True
        self.loaded = False

    def fresh(self) -> "LevelSet":
        r"""Returns an empty set with the same options."""
        return LevelSet(self.shrinkage, self.normalize, self.statistic)

    def extra_repr(self) -> str:
        r"""Returns names and state, for the printed module."""
        return f"names={self.names}, fitted={self.fitted}, calibrated={self.calibrated}"

    @property
    def fitted(self) -> bool:
        r"""Whether every level has its Gaussian."""
        return bool(self.names) and all(level.gaussian.fitted for level in self._levels())

    @property
    def calibrated(self) -> bool:
        r"""Whether every level has its calibration."""
        return self.fitted and all(level.calibration.calibrated for level in self._levels())

    def _levels(self) -> list[Level]:
        return list(self.levels)  # type: ignore[arg-type]

    def items(self) -> list[tuple[str, Level]]:
        r"""Returns the levels by name."""
        return list(zip(self.names, self._levels(), strict=True))

    def require(self, calibrated: bool, owner: str) -> None:
        r"""Refuses to go on unfitted (or uncalibrated), naming the method to call.

        Arguments:
            calibrated: Whether the calibration is needed too.
            owner: What the levels belong to, for the error.

        Raises:
            NotFittedError: If the fit, or the calibration where it is needed, is missing.
        """
        if not self.fitted:
            raise NotFittedError(
                f"the {owner} is not fitted; call `fit(batches)` on training contexts and then "
                "`calibrate(batches)` on held-out ones"
            )
        if calibrated and not self.calibrated:
            raise NotFittedError(
                f"the {owner} is fitted but not calibrated; call `calibrate(batches)` on "
                "held-out contexts"
            )

    # -- fit ---------------------------------------------------------------------------------

    def update(self, embeddings: Mapping[str, Tensor]) -> None:
        r"""Adds a batch of embeddings to the moments.

        Arguments:
            embeddings: The embeddings by name, with shapes :math:`(N, C)` or :math:`(N, C, H,
                W)`.

        Raises:
            TypeError: If they are not floating point.
            ValueError: If they are not those of earlier batches in name or shape, or not finite.
        """
        if not self.names:
            self.names = list(embeddings)
            self.kinds = [_kind(value) for value in embeddings.values()]
            self.levels.extend(Level(self.normalize) for _ in self.names)
            for level, kind in zip(self._levels(), self.kinds, strict=True):
                level.sample = Sample() if kind == MAPS else None
        self._check(embeddings)
        for name, level in self.items():
            try:
                level.gaussian.update(embeddings[name])
                if level.sample is not None:
                    level.sample.add(embeddings[name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"level {name!r}: {error}") from error

    def finalize(self, fingerprint: str, distributed: bool = False) -> None:
        r"""Ends the fit.

        Arguments:
            fingerprint: The fingerprint of the encoder.
            distributed: Whether the ranks are merged first.
        """
        for _, level in self.items():
            level.finalize(self.shrinkage, distributed)
        self.fingerprint = fingerprint

    # -- calibrate ---------------------------------------------------------------------------

    def calibrators(self) -> dict[str, Calibrator]:
        r"""Returns one empty calibrator per level.

        Raises:
            RuntimeError: If images are judged by ``"share"``, and the fit did not say above what.
        """
        if self.statistic == "share" and not self.edges_of_fit:
            raise RuntimeError(
                "statistic='share' needs the score that a fit sets for it; got a state of format "
                "1, whose fit set none: call `fit(batches)` first, or choose another statistic"
            )
        return {name: self._calibrator(level) for name, level in self.items()}

    def _calibrator(self, level: Level) -> Calibrator:
        edge = float(level.calibration.edge) if self.edges_of_fit else math.nan
        return Calibrator(level.gaussian.features or 1, edge)

    def add(self, calibrators: Mapping[str, Calibrator], embeddings: Mapping[str, Tensor]) -> None:
        r"""Adds a batch of embeddings to the calibrators.

        Arguments:
            calibrators: The calibrators of :meth:`calibrators`.
            embeddings: The embeddings by name; see :meth:`update`.

        Raises:
            ValueError: If they are not those of the fit in name or shape, or not finite.
        """
        self._check(embeddings)
        for name, level in self.items():
            try:
                calibrators[name].add(level.scores(embeddings[name]))
            except ValueError as error:
                raise ValueError(f"level {name!r}: {error}") from error

    def set_calibration(
        self, calibrators: Mapping[str, Calibrator], alpha: float, distributed: bool
    ) -> None:
        r"""Ends the calibration, and warns where it is too small for alpha.

        Arguments:
            calibrators: The calibrators, filled by :meth:`add`.
            alpha: The share of false alarms that is wanted.
            distributed: Whether the ranks are merged first.

        Raises:
            ValueError: If no context was added.
        """
        built = []
        for name, level in self.items():
            calibrator = calibrators[name]
            if distributed:
                merged = self._calibrator(level)
                for state in gather(calibrator.state()):
                    merged.extend(*state)
                calibrator = merged
            built.append(calibrator.build().to(level.gaussian.mean.device))
        if not all(calibration.calibrated for calibration in built):
            raise ValueError("the calibration batches must hold a context at least; got none")
        for level, calibration in zip(self._levels(), built, strict=True):
            level.calibration = calibration
        least, wanted = self.least_alpha, math.ceil(len(self.names) / alpha - 1e-9) - 1
        if least > alpha:
            count = len(self._levels()[0].calibration.scores)
            warnings.warn(
                f"Calibrated on {count} images, too few for alpha = {alpha:g} with "
                f"{len(self.names)} level(s): the least p-value that they can give is {least:.2g}. "
                "Contexts beyond the largest calibration score are flagged instead, with up to "
                f"{100 * least:.2g} % of false alarms. Calibrate on {wanted} images or more, "
                "or choose a larger alpha.",
                stacklevel=3,
            )

    @property
    def least_alpha(self) -> float:
        r"""The least share of false alarms that the calibration can promise."""
        count = min(len(level.calibration.scores) for level in self._levels())
        return min(1.0, len(self.names) / (count + 1))

    # -- score -------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        embeddings: Mapping[str, Tensor],
        alpha: float,
        boundary: float = 0.999,
        wrong: Tensor | None = None,
        partial: bool = False,
    ) -> OODReport:
        r"""Scores the embeddings.

        Arguments:
            embeddings: The embeddings by name.
            alpha: The share of false alarms.
            boundary: The quantile of the boundary.
            wrong: Contexts known not to be finite, whatever the encoder made of them.
            partial: Whether levels may be missing, as they come one by one from hooks.
        """
        self._check(embeddings, partial)
        fitted = [(name, level) for name, level in self.items() if name in embeddings]
        scores = {n: level.scores(embeddings[n]) for n, level in fitted}
        peaks = [s.flatten(1).amax(dim=1) if s.ndim > 1 else s for s in scores.values()]
        non_finite = torch.stack([peak.isinf() for peak in peaks]).any(dim=0)
        if wrong is not None:
            non_finite = non_finite | wrong
        share = alpha / len(self.names)
        levels = {
            name: self._report(name, level, scores[name], share, boundary, non_finite)
            for name, level in fitted
        }
        return OODReport(levels, non_finite, alpha, max(alpha, self.least_alpha))

    def _report(
        self,
        name: str,
        level: Level,
        scores: Tensor,
        share: float,
        quantile: float,
        non_finite: Tensor,
    ) -> LevelReport:
        is_map, calibration = scores.ndim > 1, level.calibration
        statistics = image_statistics(scores, float(calibration.edge))
        statistics = statistics.masked_fill(non_finite[:, None], torch.inf)
        p_values = calibration.p_values(statistics)
        boundary = calibration.boundary(quantile)
        statistic = self.statistic if is_map else "max"
        return LevelReport(
            name=name,
            statistic=statistic,
            statistics=dict(zip(STATISTICS, statistics.unbind(dim=1), strict=True)),
            p_values=dict(zip(STATISTICS, p_values.unbind(dim=1), strict=True)),
            map=scores if is_map else None,
            above=image_statistics(scores, boundary)[:, STATISTICS.index("share")],
            boundary=boundary,
            threshold=calibration.threshold(statistic, share),
            calibration=calibration,
        )

    def _check(self, embeddings: Mapping[str, Tensor], partial: bool = False) -> None:
        if not (set(embeddings) <= set(self.names) if partial else list(embeddings) == self.names):
            raise ValueError(
                f"the levels must be those of the fit, {self.names}; got {list(embeddings)}: use "
                "the encoder of the fit, or call `fit(batches)` again"
            )
        sizes = {name: len(value) for name, value in embeddings.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all levels must have the same batch size; got {sizes}")
        for (name, level), kind in zip(self.items(), self.kinds, strict=True):
            value = embeddings.get(name)
            if value is None:
                continue
            if _kind(value) != kind:
                raise ValueError(
                    f"level {name!r} must be {kind}, as in the fit; got shape {tuple(value.shape)}"
                )
            known = level.gaussian.features
            if known is not None and value.shape[1] != known:
                raise ValueError(
                    f"level {name!r} must have the {known} channels of the fit; got "
                    f"{value.shape[1]}: use the encoder of the fit, or call `fit(batches)` again"
                )

    # -- state -------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        r"""Returns names, kinds and fingerprint of the levels as JSON, in bytes with shape
        :math:`(n)`."""
        state = {
            "format": 2,
            "flowguard": __version__,
            "names": self.names,
            "kinds": self.kinds,
            "normalize": self.normalize,
            "fingerprint": self.fingerprint,
            "edges_of_fit": self.edges_of_fit,
        }
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        r"""Does nothing: the state is read before the levels are loaded, in `_load_from_state_dict`."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = state_dict.get(f"{prefix}_extra_state")
        if extra is not None:
            state = json.loads(bytes(extra.cpu().tolist()))
            if state["format"] not in (1, 2):
                error_msgs.append(
                    f"the OOD state must have format 1 or 2; got format {state['format']}, written by "
                    f"flowguard {state['flowguard']}, where this is flowguard {__version__}"
                )
                return
            if state["normalize"] != self.normalize:
                error_msgs.append(
                    f"the OOD state was fitted with normalize={state['normalize']!r}, and must be "
                    f"loaded with the same; got normalize={self.normalize!r}"
                )
                return
            self.loaded = True
            self.names, self.kinds = state["names"], state["kinds"]
            self.fingerprint = state["fingerprint"]
            # Format 1 had no frames, and chose the edges of "share" on the calibration images.
            self.edges_of_fit = state.get("edges_of_fit", False)
            if self.statistic == "share" and MAPS in self.kinds and not self.edges_of_fit:
                warnings.warn(
                    "This OOD state is of format 1: what counts for statistic='share' was chosen "
                    "on the calibration images themselves, so that more than a share alpha of "
                    "images like these can be flagged. Call `fit(batches)` and "
                    "`calibrate(batches)` again for p-values that hold.",
                    stacklevel=2,
                )
            # The parent loads its children after itself: those made here are loaded too.
            self.levels = nn.ModuleList(Level(self.normalize) for _ in self.names)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _kind(value: Tensor) -> str:
    if value.ndim not in (2, 4):
        raise ValueError(
            f"an embedding must have shape (N, C) or (N, C, H, W); got {tuple(value.shape)}"
        )
    return "vectors (N, C)" if value.ndim == 2 else MAPS
