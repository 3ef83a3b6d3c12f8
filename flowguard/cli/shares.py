r"""How several processes share the pictures of one command, on one machine or on many.

torchrun and SLURM tell each process its rank and how many there are: that is all that it takes to
know its share. They never talk to each other. Each tells in files, in a folder within that of the
pictures, that it is alive and, in the end, what became of its share, and rank 0 reads what the
others told, to tell of all. Where they do not see the same folder, each tells of its own.
"""

__all__ = ["Account", "Ledger", "Share", "SignOfLife", "share_of"]

import contextlib
import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from flowguard.io.atomic import write_json

T = TypeVar("T")

FOLDER = ".flowguard-shares"
BEAT = 0.5  # seconds between two signs of life
POLL = 0.1  # seconds between two looks at those of the others

#: Rank and number of the processes, and the same on this machine: of torchrun, then of SLURM's
#: srun. What SLURM tells a job of which srun is no part is not that: such a process is alone.
NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Share:
    r"""Which of several processes this one is.

    Arguments:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number among those of this machine.
        local_world: How many of them are on this machine, at most.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        r"""Returns this process' share: every `world`-th item.

        Arguments:
            items: All items, in the same order for all processes.

        Example:
            >>> Share(1, 3).of("abcdefgh")
            'beh'
        """
        return items[self.rank :: self.world]


def share_of(environment: Mapping[str, str]) -> Share:
    r"""Returns which of several processes this one is, by what torchrun or SLURM says.

    Arguments:
        environment: The variables of the environment.

    Raises:
        ValueError: If they are no numbers, or say that it is none of these.

    Example:
        >>> share_of({"RANK": "1", "WORLD_SIZE": "2"})
        Share(rank=1, world=2, local_rank=0, local_world=1)
        >>> share_of({})
        Share(rank=0, world=1, local_rank=0, local_world=1)
    """
    for names in NAMES:
        rank, world, *local = (environment.get(name, "") for name in names)
        if not rank or not world:
            continue
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(
                f"{names[0]} must be a number from 0 and less than that of {names[1]}, as torchrun"
                f" and srun set them; got {rank!r} and {world!r}"
            )
        # SLURM writes "2(x3),1" for three machines of two and one of one.
        own, here = ([int(n) for n in re.findall(r"(?<!x)\b\d+", text)] for text in local)
        return Share(int(rank), int(world), max(own, default=0), max(here, default=1))
    return Share()


@dataclass(frozen=True)
class Account:
    r"""What a process tells in the end.

    Arguments:
        rank: Its number.
        work: What there was to do for all processes, in a few letters that are the same for all.
        told: What became of its share.
    """

    rank: int
    work: str
    told: Any


class Ledger:
    r"""Creates the files by which processes tell of themselves; to be used in a ``with`` block.

    Rank 0 draws a number for the run, which the others take up, so that nothing is taken for
    theirs that a run has left that was killed.

    Arguments:
        folder: The folder of what is written, which all processes see.
        share: Which of them this one is.
        patience: The seconds without a sign of life after which a process is given up.
    """

    def __init__(self, folder: Path, share: Share, patience: float) -> None:
        self.folder = folder / FOLDER
        self.share = share
        self.patience = patience
        self.run = uuid.uuid4().hex if share.rank == 0 else ""
        self.read = False  # whether rank 0 reads the account of this one
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rest()
        if self.share.rank == 0:  # what was left by a run that was killed goes with it
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        own = (self._sign(self.share.rank), self._account(self.share.rank))
        with contextlib.suppress(OSError):  # the folder is gone, or others are in it
            for file in own[: 1 if self.read else 2]:
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def _rest(self) -> None:
        r"""Gives no more signs of life."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _live(self) -> None:
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        try:
            write_json(self._sign(self.share.rank), {"run": self.run, "beat": count})
        except OSError:  # the folder is gone, or the disk is full: then nobody hears
            self._over.set()

    def _sign(self, rank: int) -> Path:
        return self.folder / f"{rank}.alive"

    def _account(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def gather(self, account: Account) -> tuple[list[Account], list[int]]:
        r"""Returns the accounts of all processes, for rank 0, and who gave none.

        It waits for every process that gives signs of life.

        Arguments:
            account: That of this process.
        """
        found = {account.rank: account}
        others = {rank: SignOfLife(self._sign(rank)) for rank in range(1, self.share.world)}
        while others:
            for rank, watch in list(others.items()):
                told = self.account_of(rank)
                if told is not None:
                    found[rank] = told
                if told is not None or watch.silence() > self.patience:
                    del others[rank]
            if others:
                time.sleep(POLL)
        lost = [rank for rank in range(self.share.world) if rank not in found]
        return [found[rank] for rank in sorted(found)], lost

    def account_of(self, rank: int) -> Account | None:
        r"""Returns the account that a process has handed in during this run, if it has.

        Arguments:
            rank: The number of the process.
        """
        told = _read(self._account(rank))
        ours = self.run and told.get("run") == self.run
        return Account(rank, told["work"], told["told"]) if ours else None

    def hand_in(self, account: Account) -> bool:
        r"""Leaves an account for rank 0; returns whether that will read it, being alive.

        Arguments:
            account: The account.
        """
        self._rest()
        first = SignOfLife(self._sign(0))
        while not self.read and first.silence() <= self.patience:
            run = first.seen.get("run", "")
            if run and run != self.run:
                told = {"run": run, "work": account.work, "told": account.told}
                try:
                    write_json(self._account(account.rank), told)
                except OSError:  # the folder is gone, as rank 0 has given this one up
                    return False
                self.run, first = run, SignOfLife(self._sign(0))
            # It has lived on with this number, or has ended since.
            self.read = bool(self.run) and (first.changed or not self._sign(0).exists())
            time.sleep(POLL)
        return self.read

    def await_end(self) -> None:
        r"""Waits until rank 0 has told of all, or gives no sign of life any more.

        A process that ends with an error before ends all others, where torchrun started them.
        """
        first = SignOfLife(self._sign(0))
        while self._sign(0).exists() and first.silence() <= self.patience:
            time.sleep(POLL)


class SignOfLife:
    r"""Creates a look at how long a file has been the same. No times of files are compared with
    the clock, which differ between machines.

    Arguments:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen, self.since = _read(file), time.monotonic()
        self.changed = False

    def silence(self) -> float:
        r"""Looks at the file; returns for how many seconds it has not changed."""
        now = _read(self.file)
        if now and now != self.seen:
            self.seen, self.since, self.changed = now, time.monotonic(), True
        return time.monotonic() - self.since


def _read(file: Path) -> dict[str, Any]:
    r"""What a file of this folder says; nothing if it is not there."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
