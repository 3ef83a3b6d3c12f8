r"""The published networks by their formulas, in plain tensors: what the importers are tested by.

Nothing of the package is used here. Each network is a state dict, with the names and shapes that the
published code saves, and functions that compute from it what the published code does: the forward
direction, from which the other one follows. Where the large files of published numbers are at hand
(`FLOWGUARD_GOLDEN` names their folder), these functions are held against them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
FLOW = "flowUpsamplerNet."

#: The names of the couplings: of the step's part, of its two nets, and how many numbers a channel
#: takes.
NAMES = {
    "affine": ("affine", "fAffine", 2),
    "affinereparam": ("affinereparam", "fAffine", 2),
    "rqspline": ("rqspline", "fRQspline", 4),
    "bspline": ("bspline", "fBspline", 11),
}


@dataclass(frozen=True)
class Net:
    r"""The sizes of a network; those of the published ones are the default."""

    scale: int = 4
    steps: int = 16
    levels: int = 3
    coupling: str = "affine"
    noise_steps: Sequence[int] | None = None  # of the steps of a level, how many know of noise
    fixed: bool = False  # whether the 1×1 convolutions are rotations that are not trained
    splits: int | None = None
    blocks: int = 23
    stacked: Sequence[int] = (1, 8, 15, 22)
    features: int = 64
    growth: int = 32
    hidden: int = 64
    dead: tuple[int, int] = (96, 320)  # a convolution that nothing reads
    lowlight: bool = False
    transition_steps: int = 2
    context: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", self.features * (1 + len(self.stacked)))

    def layers(self) -> list[tuple[str, int, int, int]]:
        r"""The flow's layers: kind, channels, level, and which step of the level."""
        splits = max(self.levels - 2, 0) if self.splits is None else self.splits
        found, channels = [], 3
        for level in range(self.levels):
            channels *= 4
            found.append(("squeeze", channels, level, 0))
            found += [("transition", channels, level, i) for i in range(self.transition_steps)]
            found += [("step", channels, level, i) for i in range(self.steps)]
            if level < splits:
                found.append(("split", channels, level, 0))
                channels -= round(channels / 2)
        return found


# -- names and shapes ---------------------------------------------------------------------------


def _conv(name: str, to: int, of: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (to, of, size, size), f"{name}.bias": (to,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (1, channels, 1, 1) for part in ("bias", "logs")}


def encoder_shapes(net: Net) -> Shapes:
    r"""The names and shapes of an encoder, without the name of the encoder before them."""
    nf, gc = net.features, net.growth
    found = _conv("conv_first", nf, 12 if net.lowlight else 3)
    if net.lowlight:
        found |= _conv("conv_second", nf, nf)
    for block in range(net.blocks):
        for dense in (1, 2, 3):
            for i in range(1, 6):
                name = f"RRDB_trunk.{block}.RDB{dense}.conv{i}"
                found |= _conv(name, nf if i == 5 else gc, nf + gc * (i - 1))
    more = ["trunk_conv"]
    if net.lowlight:
        more += ["downconv1", "downconv2", "downconv3"]
    else:
        more += [f"upconv{i}" for i in range(1, 1 + round(math.log2(net.scale)))]
    for name in (*more, "HRconv"):
        found |= _conv(name, nf, nf)
    found |= _conv("conv_last", 3, nf)
    if net.lowlight:
        found |= {"awb_para.weight": (3, nf), "awb_para.bias": (3,)}
        found |= _conv("fine_tune_color_map.0", 3, nf, 1)
    return found


def shapes(net: Net) -> Shapes:
    r"""The names and shapes of a whole checkpoint."""
    found = {f"RRDB.{k}": v for k, v in encoder_shapes(net).items()}
    part, name, n = NAMES[net.coupling]
    for index, (kind, channels, *_) in enumerate(net.layers()):
        layer = f"{FLOW}layers.{index}"
        if kind == "split":
            half = round(channels / 2)
            found |= _conv(f"{layer}.conv", 2 * half, channels - half)
            found[f"{layer}.conv.logs"] = (2 * half, 1, 1)
        if kind not in ("transition", "step"):
            continue
        found |= _norm(f"{layer}.actnorm", channels)
        if net.fixed:
            for what in ("weight", "weight_transpose"):
                found[f"{layer}.invconv.{what}"] = (channels, channels, 1, 1)
        else:
            found[f"{layer}.invconv.weight"] = (channels, channels)
        if kind == "transition":
            continue
        kept = channels // 2
        nets = {name: (kept + net.context, n * (channels - kept))}
        nets["fFeatures"] = (net.context, n * channels)
        if net.noise_steps is not None:
            nets[f"{name}_std"] = (kept + 3, n * (channels - kept))
        for which, (of, to) in nets.items():
            at = f"{layer}.{part}.{which}"
            for i, size, width in ((0, 3, of), (2, 1, net.hidden)):
                found[f"{at}.{i}.weight"] = (net.hidden, width, size, size)
                found |= _norm(f"{at}.{i}.actnorm", net.hidden)
            found |= _conv(f"{at}.4", to, net.hidden)
            found[f"{at}.4.logs"] = (to, 1, 1)
    return found | {f"{FLOW}f.0.weight": (*net.dead, 3, 3), f"{FLOW}f.0.bias": net.dead[:1]}


def random_state(net: Net) -> State:
    r"""Random weights in float64, such that no layer does nothing."""
    generator = torch.Generator().manual_seed(0)
    found: State = {}
    for name, shape in shapes(net).items():
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("weight_transpose"):
            t = found[name.removesuffix("_transpose")].transpose(0, 1).contiguous()
        elif "invconv" in name:
            t = torch.linalg.qr(t.reshape(shape[:2]))[0].reshape(shape).contiguous()
            # Free ones are no rotations, so that their determinants count.
            t = t if net.fixed else t * (1 + 0.1 * torch.rand((), generator=generator))
        elif name.endswith("weight"):
            t = t * (0.7 / math.sqrt(math.prod(shape[1:])))
        else:
            t = 0.1 * t
        found[name] = t
    return found


# -- encoders -----------------------------------------------------------------------------------


def _apply(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def _trunk(state: State, net: Net, x: Tensor) -> list[Tensor]:
    r"""The outputs of the blocks: each three dense blocks of five convolutions."""
    found = []
    for block in range(net.blocks):
        whole = x
        for dense in (1, 2, 3):
            seen = [x]
            for i in range(1, 6):
                y = _apply(
                    state, f"RRDB.RRDB_trunk.{block}.RDB{dense}.conv{i}", torch.cat(seen, 1)
                )
                seen.append(_leaky(y) if i < 5 else y)
            x = x + 0.2 * seen[-1]
        x = whole + 0.2 * x
        found.append(x)
    return found


def _stack(net: Net, image: Tensor, blocks: list[Tensor]) -> Tensor:
    r"""A map, and after it the outputs of some blocks, by their nearest pixels."""
    size = image.shape[-2:]
    taken = [blocks[i] for i in net.stacked]
    return torch.cat([image, *(F.interpolate(b, size=size) for b in taken)], 1)


def encoder_maps(state: State, net: Net, lr: Tensor) -> list[Tensor]:
    r"""The map of each level of a super-resolution network, finest first."""
    blocks = _trunk(state, net, _apply(state, "RRDB.conv_first", lr))
    last = _apply(state, "RRDB.trunk_conv", blocks[-1]) + blocks[-1]
    ups, x = [], last
    for i in range(1, 1 + round(math.log2(net.scale))):
        x = _leaky(_apply(state, f"RRDB.upconv{i}", F.interpolate(x, scale_factor=2)))
        ups.append(x)
    # The finest level has half of the output's size.
    sizes = [*reversed(ups[:-1]), last]
    while len(sizes) < net.levels:
        factor = 0.5 ** (len(sizes) - len(ups) + 1)
        sizes.append(F.interpolate(last, scale_factor=factor, mode="bilinear"))
    return [_stack(net, image, blocks) for image in sizes[: net.levels]]


def equalized(channel: Tensor) -> Tensor:
    r"""The equalised histogram of the bytes of one channel, as image libraries define it."""
    counts = torch.bincount(channel.flatten().long(), minlength=256)
    first = int(counts.nonzero()[0])
    rest = channel.numel() - int(counts[first])
    if rest == 0:
        return channel.clone()
    above = counts.cumsum(0) - counts[first]
    return (above * (255.0 / rest)).round().clamp(0, 255)[channel.long()].to(channel.dtype)


def lowlight_input(low: Tensor) -> Tensor:
    r"""The six channels that a low-light network takes, from the bytes of an image."""
    floor = torch.log((low.double() / 255 + 1e-3).clamp(min=1e-3))
    even = torch.stack([torch.stack([equalized(c) for c in image]) for image in low])
    return torch.cat([floor, even.double() / 255], 1)


def color_share(image: Tensor) -> Tensor:
    r"""The share of each colour of a pixel."""
    return image / (image.sum(1, keepdim=True) + 1e-4)


def _edges(shares: Tensor) -> Tensor:
    padded = F.pad(shares, (1, 1, 1, 1))
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return torch.maximum(down.abs(), right.abs())


def lowlight_maps(state: State, net: Net, lr: Tensor) -> tuple[list[Tensor], Tensor]:
    r"""The map of each of the three levels of a low-light network, and the map of colours."""
    shares = color_share(lr[:, :3].exp())
    x = _leaky(_apply(state, "RRDB.conv_first", torch.cat([lr, shares, _edges(shares)], 1)))
    head = F.max_pool2d(_apply(state, "RRDB.conv_second", x), 2)
    blocks = _trunk(state, net, head)
    half = head + _apply(state, "RRDB.trunk_conv", blocks[-1])
    maps = [half]
    for i, activated in ((1, True), (2, False)):
        small = F.interpolate(maps[-1], scale_factor=0.5, mode="bilinear")
        y = _apply(state, f"RRDB.downconv{i}", small)
        maps.append(_leaky(y) if activated else y)
    double = F.interpolate(half, scale_factor=2)
    colors = torch.sigmoid(_apply(state, "RRDB.fine_tune_color_map.0", double))
    return [_stack(net, image, blocks) for image in maps], colors


# -- the flow -----------------------------------------------------------------------------------


def normal(z: Tensor, mean: Tensor | float = 0.0, logs: Tensor | float = 0.0) -> Tensor:
    r"""The logarithm of the normal density of each image."""
    logs = torch.as_tensor(logs, dtype=z.dtype)
    t = (z - mean) * torch.exp(-logs)
    return (-0.5 * (t.square() + math.log(2 * math.pi)) - logs).flatten(1).sum(1)


def _zeros(state: State, name: str, x: Tensor) -> Tensor:
    return _apply(state, name, x) * torch.exp(3 * state[f"{name}.logs"])


def _raw(state: State, name: str, x: Tensor, n: int) -> Tensor:
    r"""The parameters that a net gives each channel, with shape (B, C, n, H, W)."""
    for i in (0, 2):
        x = _apply({f"{name}.{i}.weight": state[f"{name}.{i}.weight"]}, f"{name}.{i}", x)
        norm = f"{name}.{i}.actnorm"
        x = F.relu((x + state[f"{norm}.bias"]) * torch.exp(state[f"{norm}.logs"]))
    return _zeros(state, f"{name}.4", x).unflatten(1, (-1, n))


def _rational(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    r"""The spline of two bins on [-0.5, 0.5], and the logarithm of its derivative."""
    least = 1e-3
    w = least + (1 - 2 * least) * torch.sigmoid(raw[:, :, 0])
    h = least + (1 - 2 * least) * torch.sigmoid(raw[:, :, 1])
    inner = least + (1 - least) * torch.exp(raw[:, :, 2])
    left = x < w - 0.5
    width, height = torch.where(left, w, 1 - w), torch.where(left, h, 1 - h)
    x_k, y_k = torch.where(left, -0.5, w - 0.5), torch.where(left, -0.5, h - 0.5)
    one = torch.ones_like(x)
    d0, d1 = torch.where(left, one, inner), torch.where(left, inner, one)
    s, t = height / width, (x - x_k) / width
    below = s + (d0 + d1 - 2 * s) * t * (1 - t)
    y = y_k + height * (s * t**2 + d0 * t * (1 - t)) / below
    slope = s**2 * (d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2) / below**2
    outside = (x <= -0.5) | (x >= 0.5)
    return torch.where(outside, x, y), torch.where(outside, 0.0, slope.log())


def _cubic(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    r"""The cubic B-spline on [-0.5, 0.5], by the recursion of Cox and de Boor."""
    m = 0.01
    raw = raw.movedim(2, -1)
    few = raw.new_full((*raw.shape[:-1], 4), m)
    gaps = torch.cat([few, m + (1 - 8 * m) * raw[..., :4].softmax(-1), few], -1)
    knots = torch.cat([torch.zeros_like(gaps[..., :1]), gaps.cumsum(-1)], -1) - 2 * m
    free = m + (1 - 8 * m) * raw[..., 4:10].softmax(-1)
    steps = torch.cat([few[..., :2], free, few[..., :2]], -1)
    controls = torch.cat([torch.zeros_like(steps[..., :1]), steps.cumsum(-1)], -1) - m
    # Another knot at each end: its place does not matter within [0, 1].
    knots = torch.cat([knots[..., :1] - m, knots, knots[..., -1:] + m], -1)
    u = (x + 0.5).unsqueeze(-1)
    basis = ((knots[..., :-1] <= u) & (u < knots[..., 1:])).to(x.dtype)
    for degree in (1, 2, 3):
        rise = (u - knots[..., : -degree - 1]) / (
            knots[..., degree:-1] - knots[..., : -degree - 1]
        )
        fall = (knots[..., degree + 1 :] - u) / (knots[..., degree + 1 :] - knots[..., 1:-degree])
        before, basis = basis, rise * basis[..., :-1] + fall * basis[..., 1:]
    y = (basis * controls).sum(-1) - 0.5
    slopes = 3 * controls.diff(dim=-1) / (knots[..., 4:-1] - knots[..., 1:-4])
    slope = (before[..., 1:-1] * slopes).sum(-1)
    outside = (x <= -0.5) | (x >= 0.5)
    return torch.where(outside, x, y), torch.where(outside, 0.0, slope.log())


def _map(coupling: str, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    if coupling in ("affine", "affinereparam"):
        scale = torch.sigmoid(raw[:, :, 1] + 2) + 1e-4
        scale = 1 / scale if coupling == "affinereparam" else scale
        y, ladj = (x + raw[:, :, 0]) * scale, scale.log()
    else:
        y, ladj = (_rational if coupling == "rqspline" else _cubic)(x, raw)
        y = y + raw[:, :, -1]
    return y, ladj.flatten(1).sum(1)


def _mix(state: State, layer: str, x: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    pixels = x.shape[-2] * x.shape[-1]
    logs = state[f"{layer}.actnorm.logs"]
    x = (x + state[f"{layer}.actnorm.bias"]) * torch.exp(logs)
    weight = state[f"{layer}.invconv.weight"]
    ladj = pixels * logs.sum()
    if not fixed:
        ladj = ladj + pixels * torch.linalg.slogdet(weight)[1]
    return torch.einsum("ij,bjhw->bihw", weight.reshape(weight.shape[:2]), x), ladj


def flow(
    state: State, net: Net, x: Tensor, maps: Sequence[Tensor], noise: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    r"""The latents of images, and the log-determinant with the densities of what splits off."""
    part, name, n = NAMES[net.coupling]
    latents, logdet = [], x.new_zeros(x.shape[0])
    for index, (kind, channels, level, step) in enumerate(net.layers()):
        layer = f"{FLOW}layers.{index}"
        if kind == "squeeze":
            x = F.pixel_unshuffle(x, 2)
            continue
        if kind == "split":
            kept = channels - round(channels / 2)
            x, z = x[:, :kept], x[:, kept:]
            prior = _zeros(state, f"{layer}.conv", x)
            mean, logs = prior[:, ::2], prior[:, 1::2]
            latents.append((z - mean) * torch.exp(-logs))
            logdet = logdet + normal(z, mean, logs)
            continue
        x, ladj = _mix(state, layer, x, net.fixed)
        logdet = logdet + ladj
        if kind == "transition":
            continue
        context, at = maps[level], f"{layer}.{part}."
        x, ladj = _map(net.coupling, x, _raw(state, f"{at}fFeatures", context, n))
        logdet = logdet + ladj
        z1, z2 = x[:, : channels // 2], x[:, channels // 2 :]
        told = 0 if net.noise_steps is None else net.noise_steps[level]
        if noise is not None and step >= net.steps - told:
            size = z1.shape[-2:]
            seen = F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
            raw = _raw(state, f"{at}{name}_std", torch.cat([z1, seen], 1), n)
            z2, ladj = _map(net.coupling, z2, raw)
            logdet = logdet + ladj
        raw = _raw(state, f"{at}{name}", torch.cat([z1, context], 1), n)
        z2, ladj = _map(net.coupling, z2, raw)
        x, logdet = torch.cat([z1, z2], 1), logdet + ladj
    return [*latents, x], logdet


def bits(logdet: Tensor, z: Tensor, image: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    r"""The negative log-likelihood of each image in bits per pixel."""
    return -(logdet + normal(z, mean)) / (math.log(2) * image.shape[-2] * image.shape[-1])
