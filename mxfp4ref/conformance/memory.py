"""How much memory there is and how much is needed, in words, and what it looks like when there is not enough."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mxfp4ref.goldens.case import Case

if sys.platform != "win32":
    import resource

__all__ = [
    "KILLED",
    "Supply",
    "cause_of",
    "few_files",
    "free",
    "killed",
    "limits",
    "needed",
    "needed_for",
    "not_enough",
    "ran_out",
    "says_so",
    "supply",
    "time_limit",
    "too_large",
]

KILLED = ", as the system does it that runs out of memory"  # said of a process that SIGKILL has ended
_SENT = ", which it or another program sent: the system was not short of memory"
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # what torch says, in a RuntimeError
_OWN = 700 << 20  # of a process with torch and this package
_CGROUP = Path("/sys/fs/cgroup")
_FILES = 24  # open at once: the kit's own, with a kernel's process, and some for the kernel
_FEW_PROCESSES = 1000  # a limit below is one that somebody has set


def limits() -> str:
    """What this process may take of memory and threads, if that is limited; else ""."""
    if sys.platform == "win32":
        return ""
    found = [
        f"{soft >> 20:,} MiB ({name})"
        for which, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d"))
        if (soft := resource.getrlimit(which)[0]) != resource.RLIM_INFINITY
    ]
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    found += [f"{soft:,} processes and threads (ulimit -u)"] if 0 <= soft < _FEW_PROCESSES else []
    return f"the limit is {' and '.join(found)}" if found else ""


def few_files() -> str:
    """That this process may open too few files, in words; "" if they are enough for the kit itself."""
    if sys.platform == "win32" or not 0 <= (soft := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < _FILES:
        return ""
    return f"expected at least {_FILES} open files, the limit is {soft} (ulimit -n)"


def time_limit(pid: int = 0, used: float = float("inf")) -> str:
    """How much of a processor's time a process, this one by default, may take, if it may take no more than `used`.

    Else "".
    """
    if sys.platform == "win32":
        return ""
    limits_of = partial(resource.prlimit, pid) if pid else resource.getrlimit
    soft = limits_of(resource.RLIMIT_CPU)[0]
    if soft == resource.RLIM_INFINITY or soft > used:
        return ""
    return f"the limit is {soft:,} s of a processor's time (ulimit -t)"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_so(str(error)))


def says_so(message: str) -> bool:
    """The same of what was made of an error."""
    return NO_MEMORY in message or message.startswith("MemoryError")


def not_enough(error: BaseException) -> str:
    """That there is not enough memory, with what is known of it."""
    details = " ".join(str(error).rpartition(f"{NO_MEMORY}: ")[2].split("\n")[0].split())
    return "; ".join(filter(None, ("there is not enough memory", details, limits())))


def cause_of(error: BaseException) -> str:
    """What is at the bottom of an error, in a line: of numpy's two pages on an import that failed, the library."""
    while "\n" in str(error).strip() and isinstance(error.__cause__, ImportError | OSError):
        error = error.__cause__
    words = " ".join(str(error).split()) or type(error).__name__
    return "; ".join(filter(None, (words, limits())))


def free() -> int | None:
    """Bytes that the system says are free, of the machine or of its container; None where it does not say."""
    found = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(max(int(limit) - int(used), 0))
    return min(found, default=None)


class Supply(NamedTuple):
    """What the system says of its memory; None where it does not say."""

    free: int | None  # bytes
    kills: int | None  # of processes, for lack of memory, since it started


def supply() -> Supply:
    """As the system has it now."""
    kills = None
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        kills = int(dict(line.split() for line in lines)["oom_kill"])
    return Supply(free(), kills)


def killed(message: str, case: Case, before: Supply) -> str:
    """The message that a case's process was KILLED, with the memory that it needs if it was for lack of that."""
    if before.kills is not None and supply().kills == before.kills:
        return message.replace(KILLED, _SENT)
    return f"{message}; {too_large(case, before.free)}"


def needed(case: Case, *, dequantised: bool = False) -> int:
    """Bytes that a kernel's process takes for a case, about, where it is handed all experts in the SM90 layout.

    With `dequantised`, where it has all of them in float32, 32 bits for each of 4.
    """
    return needed_for(case.nbytes * (8 if dequantised else 1))


def needed_for(tensors: int) -> int:
    """The same of a case with so many bytes of tensors."""
    return tensors + _OWN


def too_large(case: Case, available: int | None) -> str:
    """How much memory a case needs and how much there was, in words."""
    there = "" if available is None else f", and {available / 2**30:.1f} GiB were free"
    return f"{case.id} needs about {needed(case) / 2**30:.1f} GiB{there}"
