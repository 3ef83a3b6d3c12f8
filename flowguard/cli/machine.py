r"""What a command computes on: a device, and as many threads as there are cores at leisure."""

__all__ = ["add_machine", "check_device", "free_cores", "own_device", "own_share", "threads"]

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flowguard.cli.parsing import Parser, UserError, whole
from flowguard.cli.shares import Share, share_of

INSTANT = 0.1  # seconds that the cores are watched for
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what else says how many threads there shall be
STAT = Path("/proc/stat")
GROUP = Path("/sys/fs/cgroup/cpu.max")  # what a container may use: microseconds, of as many
OLD_GROUPS = (
    Path("/sys/fs/cgroup/cpu"),
    Path("/sys/fs/cgroup/cpu,cpuacct"),
)  # version one has two


def add_machine(parser: Parser) -> None:
    r"""Adds the options of the machine."""
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, mps, …"
    )
    parser.add_argument(
        "--threads",
        type=whole(1, 1024),
        metavar="N",
        help="CPU threads (default: OMP_NUM_THREADS, or as many as there are cores at leisure)",
    )


def check_device(name: str) -> None:
    r"""Refuses a device that cannot be used.

    Arguments:
        name: The name of the device.

    Raises:
        UserError: If it cannot be used.
    """
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from None


def own_share() -> Share:
    r"""Returns which of several processes this one is, as torchrun or SLURM say.

    Raises:
        UserError: If they say nothing that could be.
    """
    try:
        return share_of(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from None


def own_device(name: str) -> str:
    r"""Returns the device of this process, where several on one machine have as many of them.

    Arguments:
        name: The name of the device; one without a number is that of all processes.
    """
    import torch

    share = own_share()
    if share.world == 1 or name not in ("cuda", "xpu"):
        return name
    count = getattr(torch, name).device_count()
    return f"{name}:{share.local_rank % count}" if count else name


@contextlib.contextmanager
def threads(count: int | None, processes: int = 1) -> Iterator[None]:
    r"""Computes with that many threads.

    Threads that wait for each other on cores that are busy take many times as long as one: where
    nobody has chosen, in `count` or by the variables of the environment, there are as many as
    cores are free, and a line on the standard error says so.

    Arguments:
        count: The number; :py:`None` for what is chosen here.
        processes: How many processes do so on this machine.
    """
    import torch

    before = torch.get_num_threads()
    chosen = count or before
    if count is None and not any(map(os.environ.get, CHOICES)):
        free, cores = free_cores()
        chosen = max(1, min(before, free // processes))
        print(
            f"flowguard: {chosen} thread(s), as {free} of {cores} core(s) are free; --threads"
            " chooses another number",
            file=sys.stderr,
        )
    try:
        torch.set_num_threads(chosen)
        yield
    finally:
        torch.set_num_threads(before)


def free_cores() -> tuple[int, int]:
    r"""Returns how many cores are at leisure, of how many that this process may use.

    A core is at leisure if it idles for more than half of a short instant; where the system does
    not tell, the load says how many are not.
    """
    usable = usable_cores()
    limits = (group_limit(GROUP), *map(old_group_limit, OLD_GROUPS))
    most = min(len(usable), *(limit for limit in limits if limit is not None), len(usable))
    before = idle_and_total(STAT)
    if before:
        time.sleep(INSTANT)
    after = idle_and_total(STAT)
    if before != after:
        free = at_leisure(before, after, usable)
    else:  # there is no such file, or, as in some sandboxes, nothing is counted in it
        free = len(usable) - round(load())
    return max(0, min(free, most)), most


def load() -> float:
    r"""Returns how many programs want to run, on average; zero if the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def usable_cores() -> set[int]:
    r"""Returns the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def group_limit(file: Path) -> int | None:
    r"""Returns how many cores' time a container may use; :py:`None` for no limit.

    Arguments:
        file: The file of the control group.
    """
    try:
        return _cores(*file.read_text(encoding="ascii").split())
    except (OSError, ValueError, TypeError):  # there is none, or it says something else
        return None


def old_group_limit(folder: Path) -> int | None:
    r"""Returns how many cores' time a container of version one of control groups may use;
    :py:`None` for no limit.

    Arguments:
        folder: The folder of the group's processor time.
    """
    try:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        return _cores(*((folder / name).read_text(encoding="ascii") for name in names))
    except (OSError, ValueError):
        return None


def _cores(quota: str, period: str) -> int | None:
    r"""As many cores as a quota of each period is the time of; :py:`None` where it says max or -1."""
    try:
        whole_cores = int(quota) // int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return None if int(quota) < 0 else max(1, whole_cores)


Times = dict[int, tuple[int, int]]


def idle_and_total(file: Path) -> Times:
    r"""Returns how long each core has idled, and has been there, in ticks; nothing if the system
    does not tell.

    Arguments:
        file: The file in which Linux tells it.
    """
    found: Times = {}
    try:
        for line in file.read_text(encoding="ascii").splitlines():
            name, *ticks = line.split()
            if name[:3] == "cpu" and name[3:].isdecimal():
                numbers = [int(t) for t in ticks[:8]]  # what follows is counted in these
                found[int(name[3:])] = (numbers[3] + numbers[4], sum(numbers))
    except (OSError, ValueError, IndexError):
        return {}
    return found


def at_leisure(before: Times, after: Times, usable: set[int]) -> int:
    r"""Returns how many cores idled for more than half of the time between.

    Arguments:
        before: The ticks of each core at first.
        after: The ticks in the end.
        usable: The cores that count.
    """
    free = 0
    for core in usable & before.keys() & after.keys():
        idle, total = (b - a for a, b in zip(before[core], after[core], strict=True))
        free += 2 * idle > total
    return free
