r"""Batches of large matrices that end in errors or never come back, with two threads and more.

    python upstream/pytorch-batched-lu/reproduce.py                # one case
    python upstream/pytorch-batched-lu/reproduce.py --all          # the table of the README

Each case runs in a process of its own, which is ended after its time.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

CASE = """
import torch
print("ready", flush=True)
torch.manual_seed(0)
torch.set_num_threads({threads})
a = torch.randn({batch}, {size}, {size}, dtype=torch.{dtype})
a += {size} * torch.eye({size}, dtype=a.dtype)
torch.linalg.{function}(a)
"""
WORDS = {"threads": 2, "batch": 2, "size": 192, "dtype": "float64", "function": "inv"}
#: The rows of the README's table, by what they change.
TABLE = [
    *({"size": n} for n in (192, 64, 96, 112, 128, 151, 256, 300)),
    *({"function": f} for f in ("lu_factor", "slogdet", "det", "qr", "svdvals")),
    *({"function": f, "dtype": "float32"} for f in ("inv", "lu_factor")),
    {"batch": 1},
    {"threads": 1},
    {"batch": 8},
    {"threads": 4},
]


def processor() -> str:
    r"""Who made it, as the system tells."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else platform.processor()
    return "Intel" if "Intel" in text else "AMD" if "AMD" in text else platform.machine()


def outcome(seconds: float = 60, before: str = "", **words: object) -> str:
    r"""What becomes of a case: `fine`, `hangs`, or the last line of its error."""
    code = CASE.format(**{**WORDS, **words}).replace('print("ready"', before + 'print("ready"')
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        child.stdout.readline()  # the time runs when torch has been imported, however long it takes
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return "hangs"
    said = said.decode(errors="replace").strip()
    if child.returncode or "was incorrect on entry" in said:
        return said.splitlines()[-1] if said else f"ends with {child.returncode}"
    return "fine"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="the table of the README")
    parser.add_argument("--seconds", type=float, default=60, help="after which a case hangs")
    args = parser.parse_args()
    import torch

    print(processor(), "torch", torch.__version__, torch.__config__.show().splitlines()[3].strip())
    for case in TABLE if args.all else [{}]:
        words = WORDS | case
        print(*(f"{k}={v}" for k, v in words.items()), "->", outcome(args.seconds, **words))


if __name__ == "__main__":
    main()
