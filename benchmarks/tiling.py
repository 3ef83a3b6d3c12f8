r"""Tiles against the whole image: agreement, peak memory and time, at the published scale.

    python benchmarks/tiling.py [--height 512] [--width 768] [--tiles 128 256]

Each way runs in a process of its own, so that its peak of memory is its own. The weights are
random; a batch has initialised the normalisations, as in training, so that rounding errors do not
grow from layer to layer.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowguard.image import ZeroConv2d
from flowguard.models import SuperResolutionFlow


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = SuperResolutionFlow.published(steps=args.steps, coupling=args.coupling)
    with torch.no_grad():
        model.nll(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16))
    for layer in model.flow.modules():
        if isinstance(layer, ZeroConv2d):
            torch.nn.init.normal_(layer.weight, std=0.01)
    model.eval()
    lr = torch.rand(1, 3, args.height // 4, args.width // 4)
    latents = [0.8 * torch.randn(1, *s) for s in model.latent_shapes(lr)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with torch.no_grad():
        x = model.decode(latents, lr, tile=args.one or None)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    save_file({"x": x}, args.file, {"seconds": f"{seconds:.2f}", "peak": f"{peak:.1f}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--coupling", default="robust")
    parser.add_argument("--tiles", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--one", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one >= 0:
        run(args)
        return
    from safetensors import safe_open

    whole, first = None, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for tile in (0, *args.tiles):
            file = Path(folder) / f"{tile}.safetensors"
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(tile)]
            subprocess.run([*command, "--file", str(file)], check=True)
            x = load_file(file)["x"]
            with safe_open(file, "pt") as f:
                found = {k: float(v) for k, v in f.metadata().items()}
            if whole is None:
                whole, first = x, found["peak"]
            print(
                f"{f'tiles of {tile}' if tile else 'whole':12s} {found['seconds']:7.1f} s"
                f"  peak {found['peak']:7.0f} MiB ({100 * found['peak'] / first:3.0f} %)"
                f"  largest difference {(x - whole).abs().max():.1e} of {whole.abs().max():.3g}"
            )


if __name__ == "__main__":
    main()
