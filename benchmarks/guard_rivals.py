r"""The guard against its rivals: the same features, the same conditions, several scores.

Of a super-resolution model: how well each score tells artefact pixels of a sample from others, at
each level and combined; photographs from other worlds; how many photographs that nothing has seen
it flags at α = 0.01; and what it costs beside sampling.

    python benchmarks/guard_rivals.py MODEL --data DIR --out DIR       # gathers, once, and compares
    python benchmarks/guard_rivals.py MODEL --out DIR --page docs/experiments/guard.md --name affine

`--data` is a folder with ``bsds400`` (to fit to), ``bsd100`` (to calibrate with), ``kodak24`` (the
photographs that nothing has seen) and ``realsrset``.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pages import table, write_part
from rival_pictures import ALIGNED, Gathered, Part, gather, load, save
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from flowguard.models import SuperResolutionFlow
from flowguard.ood import StreamingGaussian
from flowguard.ood.metrics import decile_curve

ALPHA = 0.01
NEIGHBOURS, BANK = 10, 2048
CLUSTERS = 8
POOLED = 9  # pixels of the condition, in the rivals that average over them

#: From vectors with shape (n, C) to their scores with shape (n); a score grows with strangeness.
Score = Callable[[Tensor], Tensor]


def mahalanobis(vectors: Tensor, normalize: Any = None) -> Score:
    r"""Fits the guard's own score."""
    gaussian = StreamingGaussian(normalize=normalize)
    gaussian.update(vectors)
    return gaussian.finalize().mahalanobis


def relative(vectors: Tensor) -> Score:
    r"""Fits the relative Mahalanobis distance (Ren et al., 2021). There are no classes here: their
    place is taken by clusters, which share a covariance."""
    means = MiniBatchKMeans(CLUSTERS, random_state=0, n_init=1).fit(vectors.numpy())
    centres = torch.from_numpy(means.cluster_centers_).to(vectors)
    near = mahalanobis(vectors - centres[torch.from_numpy(means.labels_).long()])
    whole = mahalanobis(vectors)
    return lambda v: torch.stack([near(v - c) for c in centres]).amin(dim=0) - whole(v)


def nearest(vectors: Tensor, prepare: Callable[[Tensor], Tensor]) -> Score:
    r"""Fits the distance to the k-th nearest neighbour among some vectors (Sun et al., 2022)."""
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:BANK]
    bank = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute")
    bank.fit(prepare(vectors[chosen]).numpy())

    def score(v: Tensor) -> Tensor:
        return torch.from_numpy(bank.kneighbors(prepare(v).numpy())[0][:, -1])

    return score


def whitened(vectors: Tensor) -> Score:
    r"""Fits the nearest neighbours in the units in which the Mahalanobis distance is Euclid's."""
    gaussian = StreamingGaussian()
    gaussian.update(vectors)
    mean, matrix = gaussian.finalize().kernel(vectors.device, vectors.dtype)
    return nearest(vectors, lambda v: (v.to(mean) - mean) @ matrix.T)


def residue(vectors: Tensor) -> Score:
    r"""Fits the error of reconstruction from the main components, which hold 95 % of variance."""
    pca = PCA(0.95).fit(vectors.numpy())
    mean, axes = torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_)

    def score(v: Tensor) -> Tensor:
        delta = v.to(mean) - mean
        return (delta - delta @ axes.T @ axes).square().sum(dim=1)

    return score


RIVALS: dict[str, Callable[[Tensor], Score]] = {
    "Mahalanobis": mahalanobis,
    "Mahalanobis, l2": lambda v: mahalanobis(v, "l2"),
    "relative Mahalanobis": relative,
    "nearest neighbours, l2": lambda v: nearest(v, F.normalize),
    "nearest neighbours, whitened": whitened,
    "PCA reconstruction": residue,
}


class Scale(NamedTuple):
    r"""The calibrated scale of a score, on which levels compare."""

    known: Tensor  # the calibration scores, sorted
    unit: float  # from the median to the 0.999 quantile

    @classmethod
    def of(cls, scores: Tensor) -> "Scale":
        known = scores.flatten().double().sort().values
        far, middle = known[int(0.999 * (len(known) - 1))], known[len(known) // 2]
        return cls(known, max(float(far - middle), 1e-30))

    def __call__(self, scores: Tensor) -> Tensor:
        r"""Returns quantiles; beyond all calibration scores, how far in units of the scale."""
        scores = scores.double().contiguous()
        quantile = torch.searchsorted(self.known, scores).double() / len(self.known)
        return quantile + ((scores - self.known[-1]) / self.unit).clamp(0, 1e12)


class Maps(NamedTuple):
    r"""The scores of the pixels of each part, on the calibrated scale; and those of its pictures."""

    pixels: dict[str, Tensor]  # (n, H, W)
    pictures: dict[str, Tensor]  # (n)
    p_values: dict[str, Tensor]  # (n)


def calibrated(maps: Mapping[str, Tensor]) -> Maps:
    r"""Brings raw maps of one level to the calibrated scale; an image is judged by their mean."""
    means = {name: m.double().flatten(1).mean(dim=1) for name, m in maps.items()}
    by_pixel, by_picture = Scale.of(maps["calibration"]), Scale.of(means["calibration"])
    count = len(by_picture.known)
    p_values = {
        name: (1 + count - torch.searchsorted(by_picture.known, m.contiguous())) / (count + 1)
        for name, m in means.items()
    }
    return Maps(
        {name: by_pixel(m) for name, m in maps.items()},
        {name: by_picture(m) for name, m in means.items()},
        p_values,
    )


def combined(levels: Sequence[Maps]) -> Maps:
    r"""Takes the worst level of each pixel and picture; p-values by Bonferroni's rule."""

    def worst(
        values: Sequence[dict[str, Tensor]], how: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        return {name: how(torch.stack([v[name] for v in values]), dim=0) for name in values[0]}

    least = worst([m.p_values for m in levels], torch.amin)
    return Maps(
        worst([m.pixels for m in levels], torch.amax),
        worst([m.pictures for m in levels], torch.amax),
        {name: (len(levels) * p).clamp(max=1) for name, p in least.items()},
    )


def pooled(maps: Tensor) -> Tensor:
    r"""Returns local means of maps, at the border over what there is."""
    scores = maps.float().clamp(max=1e30)[:, None]
    return F.avg_pool2d(scores, POOLED, 1, POOLED // 2, count_include_pad=False)[:, 0]


def vectors_of(maps: Tensor) -> Tensor:
    return maps.float().movedim(1, -1).flatten(0, -2)


def level_maps(fit: Callable[[Tensor], Score], found: Gathered, level: int) -> dict[str, Tensor]:
    r"""Fits a score to one level and returns the maps of all other parts."""
    score = fit(vectors_of(found.parts["fit"].levels[level]))
    maps = {}
    for name, part in found.parts.items():
        if name != "fit":
            features = part.levels[level]
            maps[name] = score(vectors_of(features)).reshape(len(features), *features.shape[2:])
    return maps


class Row(NamedTuple):
    r"""What one score is worth."""

    artefacts: list[float]  # the area for artefact pixels: of each level, and combined
    spearman: float  # how their share rises over the deciles of the combined score
    source: float  # for photographs against all other conditions, combined
    worlds: float  # for photographs against pictures that nobody spoilt on purpose
    crops: float  # the share of photographs' crops that are flagged
    pictures: float  # the share of photographs with a crop that is flagged
    cost: float  # processor time beside that of a sample; NaN for what needs a sample


def strange(found: Gathered) -> list[str]:
    return [name for name in found.parts if name not in ALIGNED]


def area(scores: Tensor, truth: Tensor) -> float:
    if not 0 < int(truth.sum()) < truth.numel():
        return float("nan")
    return float(roc_auc_score(truth.flatten().numpy(), scores.flatten().numpy()))


def row(found: Gathered, levels: Sequence[Maps], cost: float, by_pixel: bool = True) -> Row:
    r"""Measures a score.

    Arguments:
        found: What was gathered.
        levels: Its maps at each level.
        cost: What it costs.
        by_pixel: Whether there are scores of pixels; if not, all of a picture have its own.
    """
    every = [*levels, combined(levels)] if len(levels) > 1 else list(levels)
    others = strange(found)
    sampled = [name for name in others if found.parts[name].sampled]
    truth = torch.cat([found.parts[name].mask for name in sampled])

    def pixels(maps: Maps) -> Tensor:
        if by_pixel:
            return torch.cat([maps.pixels[name] for name in sampled])
        return torch.cat([maps.pictures[name] for name in sampled])[:, None, None].expand_as(truth)

    whole = every[-1]

    def source(names: Sequence[str]) -> float:
        known, odd = whole.pictures["photographs"], [whole.pictures[name] for name in names]
        labels = torch.cat([torch.zeros(len(known)), torch.ones(sum(map(len, odd)))])
        return area(torch.cat([known, *odd]), labels)

    flagged = whole.p_values["photographs"] <= ALPHA
    owner = found.parts["photographs"].picture
    each = [bool(flagged[owner == number].any()) for number in owner.unique()]
    return Row(
        [area(pixels(maps), truth) for maps in every],
        decile_curve(pixels(whole), truth).spearman,
        source(others),
        source(others[:1]),
        float(flagged.float().mean()),
        sum(each) / len(each),
        cost,
    )


def rows(found: Gathered) -> Iterator[tuple[str, Row]]:
    r"""Yields the measures of all scores."""
    levels = range(len(found.parts["fit"].levels))
    # Vectors were kept at as many pixels as the last level has; a finer one has four times as many.
    shares = [4.0 ** (len(levels) - 1 - level) for level in levels]
    whole = found
    for name, fit in RIVALS.items():
        raw, cost = [], 0.0
        # Neighbours take long to find: they are asked for at every other row and column.
        found = thinned(whole) if "neighbours" in name else whole
        for level in levels:
            maps = level_maps(fit, found, level)
            raw.append(maps)
            some = whole.parts["photographs"].levels[level][:8]
            score = fit(vectors_of(whole.parts["fit"].levels[level][:8]))
            start = time.process_time()
            score(vectors_of(some))
            cost += shares[level] * (time.process_time() - start) / len(some)
        yield name, row(found, [calibrated(maps) for maps in raw], cost / found.sampling)
        if name == "Mahalanobis":
            means = [{k: pooled(m) for k, m in maps.items()} for maps in raw]
            yield (
                f"{name}, mean of {POOLED}×{POOLED}",
                row(found, [calibrated(maps) for maps in means], cost / found.sampling),
            )


def cut(part: Part, rows: slice) -> Part:
    levels, *rest = part
    return Part([maps[rows] for maps in levels], *(values[rows] for values in rest))


def thinned(found: Gathered) -> Gathered:
    r"""Returns every other row and column of all but what is fitted to."""

    def some(values: Tensor) -> Tensor:
        return values[..., ::2, ::2] if values.ndim > 2 else values

    parts = {
        name: part
        if name == "fit"
        else Part([some(maps) for maps in part.levels], *map(some, part[1:]))
        for name, part in found.parts.items()
    }
    return found._replace(parts=parts)


def sampled_rows(found: Gathered) -> Iterator[tuple[str, Row]]:
    r"""Yields the measures of what must draw a sample first. It was not drawn for calibration:
    half of the photographs take its place."""
    parts = {name: part for name, part in found.parts.items() if part.sampled}
    photographs = parts["photographs"]
    half = len(photographs.picture) // 2
    parts["calibration"] = cut(photographs, slice(None, half))
    parts["photographs"] = cut(photographs, slice(half, None))
    usual = float(parts["calibration"].density.mean())
    own = found._replace(parts=parts)
    nan = float("nan")
    scores: dict[str, Callable[[Part], Tensor]] = {
        "log-density of a sample": lambda part: -part.density[:, None, None],
        "typicality of a sample": lambda part: (part.density - usual).abs()[:, None, None],
        "reconstruction of the condition": lambda part: part.returned,
    }
    for name, score in scores.items():
        maps = {k: score(part).clamp(-1e30, 1e30) for k, part in parts.items()}
        yield name, row(own, [calibrated(maps)], nan, by_pixel="condition" in name)


def lines(measured: Mapping[str, Row], levels: int) -> str:
    r"""Returns the table."""

    def cells(one: Row) -> list[str]:
        areas = ["–"] * (levels + 1 - len(one.artefacts)) + [f"{a:.3f}" for a in one.artefacts]
        told = [*areas, *(f"{v:.3f}" for v in (one.spearman, one.source, one.worlds))]
        if math.isnan(one.cost):  # too few were calibrated with for α
            return [*told, "–", "–", "a sample"]
        return [*told, *(f"{100 * s:.1f} %" for s in (one.crops, one.pictures, one.cost))]

    head = ["score", *(f"level {n + 1}" for n in range(levels)), "combined"]
    head += [
        "Spearman",
        "other worlds",
        "RealSRSet",
        "crops flagged",
        "photographs flagged",
        "cost",
    ]
    return table(head, [[name, *cells(one)] for name, one in measured.items()])


def compare(found: Gathered) -> dict[str, Row]:
    r"""Returns the measures of all scores, by name."""
    measured = {}
    for name, one in itertools.chain(rows(found), sampled_rows(found)):
        print(f"{name}: {one}", flush=True)
        measured[name] = one
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder of a super-resolution model")
    parser.add_argument("--data", type=Path, help="the folder of the pictures' folders")
    parser.add_argument("--out", type=Path, required=True, help="where what is gathered is kept")
    parser.add_argument("--crops", type=int, default=2, help="crops of each picture")
    parser.add_argument("--pictures", type=int, default=8, help="photographs that are corrupted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="the page to write the table into")
    parser.add_argument("--name", default="rivals", help="the name of its markers")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.name}.safetensors"
    if not file.exists():
        if options.data is None:
            parser.error("--data is needed where nothing was gathered yet")
        names = {"fit": "bsds400", "calibration": "bsd100", "photographs": "kodak24"}
        names["RealSRSet"] = "realsrset"
        folders = {kind: options.data / name for kind, name in names.items()}
        model = SuperResolutionFlow.from_pretrained(options.model)
        save(file, gather(model, folders, options.crops, options.pictures, options.seed))
    found = load(file)
    text = lines(compare(found), len(found.parts["fit"].levels))
    print(text)
    if options.page:
        write_part(options.page, options.name, text)


if __name__ == "__main__":
    main()
