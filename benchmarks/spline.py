r"""Times the rational-quadratic spline beside those of nflows, zuko and normflows.

All run in one process on the same numbers, in turns (A B C A B C ...); the tables give medians.
The parameters are drawn as K logits for the peers; ours takes K - 1, the last one being zero.

    python benchmarks/spline.py                                   # everything (long)
    python benchmarks/spline.py --bins 2 8 --elements 150000 --repeats 5
    python benchmarks/spline.py --device cpu --threads 1 --write-readme
    python benchmarks/spline.py --device cpu --threads 1 --processor-time   # on a machine at work
    python benchmarks/spline.py --device cpu --ours eager,compiled,traced   # our kernels, called eagerly

`x copy` is the time over the copy limit, the bytes that the call has to read and to write divided
by the bandwidth of `torch.copy_` (256 MiB to 256 MiB, in the same turns): 1 is the speed of the
memory, which a call whose data stay in the cache may exceed. The memory is the peak of all that
forward and backward allocate beyond inputs, outputs and gradients.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import allocated
from pages import between, write_part
from torch import Tensor

OURS = "flowguard"
PEERS = ("nflows", "zuko", "normflows")
WAYS = ("eager", "compiled", "traced")  # of `flowguard.kernels`, for calls in eager mode
MODES = ("forward", "inverse", "forward+inverse", "forward+backward")
HOW = ("eager", "compiled")
BOUND = 5.0
SAMPLE_SECONDS = 0.02  # a sample repeats short calls until it lasts about this long
LEAST_TURNS = 3  # even where the time for a line is over
PROBE = 2**17  # elements on which memory is measured before a larger run
COPY_BYTES = 2**28
README = Path(__file__).resolve().parents[1] / "README.md"
CLOCK = [time.perf_counter]
PART = "spline-benchmark"  # the name of the markers in the README

Spline = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Call = Callable[[], Sequence[Tensor]]


class Case(NamedTuple):
    r"""One line of the table."""

    bins: int
    elements: int
    mode: str
    how: str


class Result(NamedTuple):
    r"""Milliseconds and bytes per implementation, or the failure in words."""

    case: Case
    copy: float
    time: dict[str, float | str]
    memory: dict[str, float | str]
    broken: set[str]  # compiled, but not into one graph


def columns(ways: Sequence[str]) -> list[str]:
    r"""What is compared, ours first."""
    ours = [OURS] if tuple(ways) == WAYS[:1] else [f"{OURS} {way}" for way in ways]
    return [*ours, *PEERS]


def is_ours(name: str) -> bool:
    return name.split()[0] == OURS


def load(name: str) -> Spline:
    r"""The spline of a library as (x, widths, heights, derivatives, inverse) -> (y, ladj)."""
    if is_ours(name):
        ours = importlib.import_module("flowguard.functional").rational_quadratic_spline
        kernels = importlib.import_module("flowguard.functional").kernels
        way = WAYS[0] if name == OURS else name.split()[1]

        def flowguard(
            x: Tensor, w: Tensor, h: Tensor, d: Tensor, inverse: bool
        ) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling():
                return ours(x, w, h, d, bound=BOUND, inverse=inverse)
            with kernels(way):  # for the backward too
                return ours(x, w, h, d, bound=BOUND, inverse=inverse)

        return flowguard

    if name == "zuko":
        transform = importlib.import_module("zuko.transforms").MonotonicRQSTransform

        def zuko(
            x: Tensor, w: Tensor, h: Tensor, d: Tensor, inverse: bool
        ) -> tuple[Tensor, Tensor]:
            t = transform(w, h, d, bound=BOUND)
            if inverse:
                y = t._inverse(x)
                return y, -t.call_and_ladj(y)[1]
            return t.call_and_ladj(x)

        return zuko

    path = {"nflows": "nflows.transforms.splines", "normflows": "normflows.utils.splines"}[name]
    peer = importlib.import_module(path).unconstrained_rational_quadratic_spline

    def unconstrained(
        x: Tensor, w: Tensor, h: Tensor, d: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return peer(x, w, h, d, inverse=inverse, tails="linear", tail_bound=BOUND)

    return unconstrained


def draw(case: Case, device: torch.device, layout: str, *, spare: bool) -> list[Tensor]:
    r"""x, widths, heights, derivatives, and two cotangents: the same numbers for everyone.

    With `spare`, widths and heights have a last logit, zero, as the peers want it.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = randn(case.elements).mul_(BOUND / 2)  # 5 % of the elements lie in the tails
    params = [randn(case.bins - 1, case.elements) for _ in range(3)]
    if spare:
        zero = x.new_zeros(1, case.elements)
        params[:2] = [torch.cat([p, zero]) for p in params[:2]]
    params = [p.t() if layout == "first" else p.t().contiguous() for p in params]
    cotangents = [randn(case.elements) for _ in range(2)]

    return [x, *params, *cotangents]


def least_bytes(case: Case) -> int:
    r"""Bytes that a call has to read and to write, in float32."""
    inputs, outputs = 1 + 3 * (case.bins - 1), 2
    floats = {
        "forward": inputs + outputs,
        "inverse": inputs + outputs,
        "forward+inverse": 2 * (inputs + outputs),
        "forward+backward": 2 * (inputs + outputs),  # and read cotangents, write gradients
    }

    return 4 * case.elements * floats[case.mode]


def prepare(spline: Spline, case: Case, tensors: Sequence[Tensor]) -> Call:
    r"""The call to time. Its result holds outputs, and gradients if there are any."""
    x, w, h, d, y_cotangent, ladj_cotangent = tensors

    if case.mode == "forward+backward":
        leaves = [t.detach().requires_grad_() for t in (x, w, h, d)]

        def train() -> Sequence[Tensor]:
            y, ladj = spline(leaves[0], leaves[1], leaves[2], leaves[3], False)
            grads = torch.autograd.grad((y, ladj), leaves, (y_cotangent, ladj_cotangent))
            return y.detach(), ladj.detach(), *grads

        return train

    if case.mode == "forward+inverse":

        def both() -> Sequence[Tensor]:
            return *spline(x, w, h, d, False), *spline(x, w, h, d, True)

        return both

    return lambda: spline(x, w, h, d, case.mode == "inverse")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, times: int) -> float:
    synchronize(device)
    start = CLOCK[0]()
    for _ in range(times):
        call()
    synchronize(device)

    return (CLOCK[0]() - start) / times


def temporaries(call: Call, device: torch.device) -> int:
    r"""Peak bytes of what a call allocates beyond the tensors that it returns.

    What stays counts as far as it exceeds the results, such as memory that is kept for the next
    call: it is released first, to be counted.
    """
    results, _, released, staying = allocated(call, device)
    wanted = sum(t.numel() * t.element_size() for t in results)

    return released + max(0, staying - wanted)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return sys.maxsize


def failure(error: BaseException) -> str:
    r"""A failure in a few words, fit for a cell of a table."""
    line = (str(error).strip().splitlines() or [""])[0].replace("|", "/")
    name = type(error).__name__

    return f"{name}: {line[:40]}" if line else name


def needed_bytes(spline: Spline, case: Case, tensors: Sequence[Tensor]) -> float:
    r"""What a large eager call will take, extrapolated from two small ones."""
    if case.elements <= 2 * PROBE:
        return 0.0

    used = []
    for elements in (PROBE, 2 * PROBE):
        call = prepare(spline, case, [t[:elements] for t in tensors])
        results = sum(t.numel() * t.element_size() for t in call())
        used.append(temporaries(call, tensors[0].device) + results)

    return used[1] + (used[1] - used[0]) * (case.elements / PROBE - 2)


def ready(
    name: str, case: Case, tensors: Sequence[Tensor], memory: dict[str, float | str]
) -> tuple[Call, bool]:
    r"""The call, compiled, warm and with its memory measured; and whether its graph broke."""
    device = tensors[0].device
    spline = load(name)
    needed = needed_bytes(spline, case, tensors)
    if needed > 0.9 * available_bytes(device):
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB")

    torch._dynamo.utils.counters.clear()
    if case.how == "compiled":
        # Ours must compile into one graph; the peers may break it.
        spline = torch.compile(spline, fullgraph=is_ours(name), dynamic=False)
    call = prepare(spline, case, tensors)
    call()
    call()
    broken = bool(torch._dynamo.utils.counters["graph_break"])
    if case.mode == "forward+backward":
        memory[name] = temporaries(call, device)

    return call, broken


def measure(
    case: Case,
    device: torch.device,
    layout: str,
    repeats: int,
    limit: float,
    names: Sequence[str] = (OURS, *PEERS),
) -> Result:
    r"""Runs one line of the table: warm up, measure memory, then time all in turns."""
    if case.how == "compiled":
        torch._dynamo.reset()
    gc.collect()
    ours, peers = (draw(case, device, layout, spare=spare) for spare in (False, True))
    times: dict[str, float | str] = {}
    memory: dict[str, float | str] = {}
    turns: dict[str, Callable[[], object]] = {}
    broken = set()

    for name in names:
        try:
            tensors = ours if is_ours(name) else peers
            turns[name], breaks = ready(name, case, tensors, memory)
            if breaks:
                broken.add(name)
        except ModuleNotFoundError as error:
            times[name] = memory[name] = f"{error.name} not installed"
        except Exception as error:  # a failure is a result, whatever its type
            times[name] = memory[name] = failure(error)

    source = torch.full((COPY_BYTES,), 1, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    turns["copy"] = lambda: target.copy_(source)

    samples: dict[str, list[float]] = {name: [] for name in turns}
    counts = {
        name: max(1, round(SAMPLE_SECONDS / max(seconds(call, device, 1), 1e-6)))
        for name, call in turns.items()
    }
    start = time.perf_counter()
    for turn in range(repeats):
        for name, call in turns.items():
            samples[name].append(1e3 * seconds(call, device, counts[name]))
        if time.perf_counter() - start > limit and turn + 1 >= LEAST_TURNS:
            break

    for name in turns:
        times[name] = statistics.median(samples[name])
    # A copy of n bytes reads and writes them, so that it moves 2 n.
    copy = statistics.median(samples["copy"]) * least_bytes(case) / (2 * COPY_BYTES)

    return Result(case, copy, times, memory, broken)


def versions(names: Sequence[str]) -> str:
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")

    return ", ".join(found)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def title(device: torch.device, layout: str, repeats: int) -> str:
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else "CUDA"
    if CLOCK[0] is time.process_time:
        where += ", processor time on a machine at work"

    return (
        f"{device_name(device)} ({where}), float32, parameters {layout} in memory, medians of "
        f"{repeats}; {versions(('torch', *PEERS))}."
    )


def count(elements: int) -> str:
    return f"{elements:.2g}".replace("e+0", "e")


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def against(
    name: str, first: str, result: Result, figures: dict[str, float | str], unit: float
) -> str:
    r"""A figure and how many times that of the first one it is; or why there is none."""
    ours, peer = figures[first], figures[name]
    if isinstance(peer, str):
        return peer
    text = number(peer / unit)
    if not isinstance(ours, str) and ours > 0:
        text += f" ({number(peer / ours)}×)"

    return text + "†" * (name in result.broken)


def tables(results: Sequence[Result], names: Sequence[str] = (OURS, *PEERS)) -> str:
    r"""Two tables in Markdown: milliseconds of all modes, MiB of forward+backward."""

    def head(first: str, *more: str) -> list[str]:
        cells = ["K", "elements", *more, "how", first, *others]
        return [row(cells), row(["---:"] * 2 + ["---"] * (1 + len(more)) + ["---:"] * len(names))]

    main, *others = names
    speed = head(f"{main} ms (× copy)", "mode")
    space = head(f"{main} MiB")
    for result in results:
        case, ours = result.case, result.time[main]
        label = [str(case.bins), count(case.elements)]
        if not isinstance(ours, str):
            ours = f"{number(ours)} ({number(ours / result.copy)})"
        peers = [against(name, main, result, result.time, 1.0) for name in others]
        speed.append(row([*label, case.mode, case.how, ours, *peers]))
        if case.mode == "forward+backward":
            used = result.memory[main]
            used = used if isinstance(used, str) else number(used / 2**20)
            peers = [against(name, main, result, result.memory, 2**20) for name in others]
            space.append(row([*label, case.how, used, *peers]))

    text = "\n".join(speed)
    if len(space) > 2:
        text += "\n\nMemory of forward+backward beyond inputs, outputs and gradients:\n\n"
        text += "\n".join(space)

    if any(result.broken for result in results):
        text += "\n\n† compiled in pieces, for the compiler had to break the graph."

    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bins", type=int, nargs="+", default=[2, 4, 8, 16])
    add("--elements", type=lambda s: int(float(s)), nargs="+", default=[150_000, 10_000_000])
    add("--device", nargs="+", default=devices, help="cpu, cuda; default: all present")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--how", nargs="+", choices=HOW, default=list(HOW))
    add(
        "--ours",
        type=lambda s: s.split(","),
        default=list(WAYS[:1]),
        help=f"some of {', '.join(WAYS)}, separated by commas: our kernels in eager mode",
    )
    add("--layout", choices=("last", "first"), default="last", help="of the bins in memory")
    add("--repeats", type=int, default=15)
    add("--limit", type=float, default=60.0, help="seconds for the turns of one line")
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--processor-time",
        action="store_true",
        help="of the CPU, not time on the wall: with one thread, on a machine at work",
    )
    add("--markdown", type=Path, help="file to write the tables to")
    add("--write-readme", action="store_true", help="put the tables between README.md's markers")

    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if not set(options.ours) <= set(WAYS):
        raise SystemExit(f"--ours must be of {', '.join(WAYS)}; got {', '.join(options.ours)}")
    names = columns(options.ours)
    if names[0] != OURS:
        options.how = ["eager"]  # compiled, all are the same
    if options.write_readme and names[0] != OURS:
        raise SystemExit("--write-readme is for the table of our only way; leave --ours out")
    torch.set_num_threads(options.threads)
    if options.processor_time:
        if options.threads > 1 or options.device != ["cpu"]:
            raise SystemExit("--processor-time is for one thread: add --device cpu --threads 1")
        CLOCK[0] = time.process_time
    if options.write_readme:
        between(README.read_text(encoding="utf-8"), PART, "")  # fail before the long run
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)  # graph breaks: see the tables

    parts = []
    for device in map(torch.device, options.device):
        results = []
        for bins in options.bins:
            for elements in options.elements:
                for mode in options.modes:
                    for how in options.how:
                        case = Case(bins, elements, mode, how)
                        how_often = options.repeats, options.limit
                        result = measure(case, device, options.layout, *how_often, names)
                        results.append(result)
                        print(
                            tables(results[-1:], names).splitlines()[2],
                            file=sys.stderr,
                            flush=True,
                        )
        parts.append(
            f"{title(device, options.layout, options.repeats)}\n\n{tables(results, names)}"
        )

    text = "\n\n".join(parts)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    if options.write_readme:
        write_part(README, PART, text)


if __name__ == "__main__":
    main()
