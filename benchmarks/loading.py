r"""What a folder of pictures costs a training.

    python benchmarks/loading.py steps DIR                 # against the same tensors from memory
    python benchmarks/loading.py memory DIR --count 20000  # links to its pictures, again and again

The model is a robust super-resolution flow of 1.8 million parameters, on 12 crops of 48×48. Steps
are made by turns in one process, with the folder's batches and with those kept from before, so that
whatever else runs on the machine slows both; the processor time is that of the training process,
without its workers. Memory is the proportional share (PSS) of the process
and its workers together, with as many pictures kept as the budget holds.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowguard.io.folder import find
from flowguard.models import PyramidEncoder, SuperResolutionFlow
from flowguard.training.pictures import CropBatches, ReducedPairs, pairs_of

SCALE, CROP, BATCH = 4, 48, 12
Batch = tuple[Tensor, Tensor]


def step_of(model: SuperResolutionFlow, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    r"""Makes a step."""
    optimizer.zero_grad(set_to_none=True)
    model.nll(*batch).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()


def loader_of(folder: Path, workers: int, budget: int) -> tuple[ReducedPairs, Iterator[Batch]]:
    r"""The batches of a folder."""
    pairs, _ = pairs_of(folder, scale=SCALE, crop=CROP, budget=budget)
    assert isinstance(pairs, ReducedPairs)
    batches = CropBatches(pairs, size=CROP, batch=BATCH, seed=0)
    loader = DataLoader(batches, batch_size=None, sampler=itertools.count(), num_workers=workers)
    return pairs, iter(loader)


def model_of() -> tuple[SuperResolutionFlow, torch.optim.Optimizer]:
    r"""The model and its optimiser."""
    torch.manual_seed(0)
    encoder = PyramidEncoder(64, scale=SCALE, levels=2, blocks=8)
    model = SuperResolutionFlow(
        scale=SCALE, levels=2, steps=4, coupling="robust", encoder=encoder
    ).train()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def steps(args: argparse.Namespace) -> None:
    r"""Times steps with both kinds of batches, by turns."""
    model, optimizer = model_of()
    _, loader = loader_of(args.folder, args.workers, args.budget)
    kept = [next(loader) for _ in range(args.run)]
    step_of(model, optimizer, kept[0])
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    names = ("memory", "folder")
    seconds: dict[tuple[str, str], list[float]] = {(c, n): [] for c in clocks for n in names}
    for _ in range(args.rounds):
        for name, source in zip(names, (iter(kept), loader), strict=True):
            start = {c: clock() for c, clock in clocks.items()}
            for batch in itertools.islice(source, args.run):
                step_of(model, optimizer, batch)
            for c, clock in clocks.items():
                seconds[c, name].append((clock() - start[c]) / args.run)
    for c in clocks:
        for name in names:
            found = seconds[c, name]
            print(
                f"{c}, {name}: {1e3 * median(found):.1f} ms a step, least {1e3 * min(found):.1f}"
            )
        both = zip(seconds[c, "folder"], seconds[c, "memory"], strict=True)
        ratios = [a / b for a, b in both]
        print(f"{c}, folder against memory: median of {len(ratios)} ratios {median(ratios):.3f}")


def share(process: int) -> float:
    r"""The proportional share of memory of a process and its children, in GB."""
    kilobytes = 0
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            kilobytes += int(line.split()[1])
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return kilobytes / 1e6 + sum(share(int(child)) for child in children)


def memory(args: argparse.Namespace) -> None:
    r"""Tells how long a large folder takes to start with, and the memory while steps are made."""
    files = find(args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(args.count):
            source = files[i % len(files)]
            (Path(temporary) / f"{i:06d}{source.suffix}").symlink_to(source.resolve())
        start, busy = time.perf_counter(), time.process_time()
        pairs, loader = loader_of(Path(temporary), args.workers, args.budget)
        print(
            f"start: {time.perf_counter() - start:.2f} s, of the processor"
            f" {time.process_time() - busy:.2f} s; {pairs.files.bytes / 1e9:.2f} GB of pixels"
        )
        next(loader)
        print(f"first batch after {time.perf_counter() - start:.2f} s")
        kept = 0
        for i in range(len(pairs.files)):  # fill what there is room for
            kept += pairs.files.whole(i).nbytes
            if kept > args.budget:
                break
        model, optimizer = model_of()
        for batch in itertools.islice(loader, args.run):
            step_of(model, optimizer, batch)
        print(f"memory of all processes: {share(os.getpid()):.2f} GB")


def main() -> None:
    r"""Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("steps", "memory"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget", type=int, default=10**9, help="bytes of pixels that are kept")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--run", type=int, default=10, help="steps at a time")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"steps": steps, "memory": memory}[args.part](args)


if __name__ == "__main__":
    main()
