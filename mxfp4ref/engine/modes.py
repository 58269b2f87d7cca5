"""`swap`, `shadow` and `restore`, by a line of code or by the environment."""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import re
import sys
from pathlib import Path
from typing import Literal

from mxfp4ref._words import did_you_mean
from mxfp4ref.engine import install
from mxfp4ref.engine.counting import LOGGER, Counting, Counts, show_log

__all__ = ["counts", "restore", "shadow", "start", "swap"]

# torch is imported when it is needed: a process that never calls the kernel does not wait for it.

_MODES = ("swap", "shadow")
_counting = Counting("swap")
_exit_prepared = False


def swap(*, fall_through: bool = True, strict: bool | Literal["count"] = "count") -> None:
    """Let the oracle answer every call of flashinfer's `cutlass_fused_moe` in this process.

    Takes the place of a swap or shadow before it. flashinfer may be imported before or later.

    A CUDA graph can capture the oracle where its forward runs on a Hopper GPU and the same call was made once before,
    as engines do to warm up; else the capture raises RuntimeError: switch CUDA graphs off.

    Args:
        fall_through: let the real kernel answer calls that are not modelled, instead of raising NotImplementedError.
        strict: as for `torch_ref_cutlass_fused_moe`; a server must not be stopped by what the kernel accepts.

    Raises:
        TypeError, ValueError: an option has the wrong type or value.
        ModuleNotFoundError: flashinfer is not installed.
    """
    from mxfp4ref.engine.swapping import Swap

    counting = Counting("swap")
    answer = Swap(counting, fall_through=fall_through, strict=strict)
    _begin(counting)
    install.install(lambda: answer)


def shadow(*, every: int = 1, dump: str | os.PathLike[str] | None = None, dumps: int = 4) -> None:
    """Let the real kernel answer, and compare its output with the oracle's, bit by bit.

    Takes the place of a swap or shadow before it. flashinfer may be imported before or later. What the engine gets is
    what the kernel returned; no exception of the oracle reaches it. The log (logger "mxfp4ref.engine") has the first
    difference of each layer. While a CUDA graph is captured nothing is compared, and what it replays later is never
    seen: switch CUDA graphs off for a check.

    Args:
        every: compare the first and then every n-th call of each layer.
        dump: a folder for the first call that differs of each layer, in the files of flashinfer's own recorder, with
            the oracle's output beside them.
        dumps: at most so many of them a process; each holds all weights of a layer.

    Raises:
        TypeError, ValueError: an option has the wrong type or value.
        ModuleNotFoundError: flashinfer is not installed.
    """
    from mxfp4ref.engine.shadowing import Shadow

    counting = Counting("shadow")
    answer = Shadow(counting, every=every, dump=None if dump is None else Path(dump), dumps=dumps)
    _begin(counting)
    install.install(lambda: answer)


def restore() -> None:
    """Take the oracle out: the real kernel is as it was, for every holder of the function."""
    install.restore()


def counts() -> Counts:
    """What became of the calls since the last `swap` or `shadow`."""
    return _counting.counts()


def start() -> None:
    """Do what the environment says, unless something is installed already; without `MXFP4REF`, nothing.

    `MXFP4REF` is "swap" or "shadow", `MXFP4REF_EVERY` and `MXFP4REF_DUMP` are the shadow's options.

    Raises:
        ValueError: a variable has another value.
    """
    mode = os.environ.get("MXFP4REF")
    if not mode or install.installed():
        return
    if mode not in _MODES:
        hint = did_you_mean(mode, _MODES)
        raise _refusal(f"MXFP4REF: expected 'swap' or 'shadow' in the environment, got {mode[:80]!r}{hint}")
    every = os.environ.get("MXFP4REF_EVERY") or "1"
    if re.fullmatch("0*[1-9][0-9]{0,8}", every) is None:
        raise _refusal(
            f"MXFP4REF_EVERY: expected an int from 1 to 999999999 in the environment, got {every[:80]!r}"
        )
    dump = os.environ.get("MXFP4REF_DUMP")
    if dump and os.path.lexists(dump) and not os.path.isdir(dump):
        raise _refusal(f"MXFP4REF_DUMP: expected a folder in the environment, got {dump[:80]!r}")

    counting = Counting(mode)
    _begin(counting)

    def answer() -> install.Answer:
        from mxfp4ref.engine.shadowing import Shadow
        from mxfp4ref.engine.swapping import Swap

        if mode == "swap":
            return Swap(counting)
        return Shadow(counting, every=int(every), dump=Path(dump) if dump else None)

    try:
        install.install(answer)
    except ModuleNotFoundError as error:  # this may be any Python program
        LOGGER.info("MXFP4REF=%s has no effect here: %s", mode, error)


def _refusal(message: str) -> ValueError:
    """The error, which is told again at the end where Python passes over it: in sitecustomize and usercustomize."""
    if sys.modules.keys().isdisjoint(("sitecustomize", "usercustomize")):
        return ValueError(message)
    words = f"ERROR {LOGGER.name} nothing was observed in this process: {message}"
    atexit.register(lambda: print(words, file=sys.__stderr__))
    return ValueError(message)


def _begin(counting: Counting) -> None:
    """Count anew, in a log that can be seen, with the counts at the end of the process."""
    global _counting, _exit_prepared
    _counting = counting
    show_log()
    if not _exit_prepared:
        _exit_prepared = True
        atexit.register(_at_exit)
        multiprocessing.util.register_after_fork(_at_exit, _in_worker)


def _in_worker(_: object) -> None:
    """A forked worker counts for itself, and leaves without `atexit`."""
    _counting.forget()
    multiprocessing.util.Finalize(None, _at_exit, exitpriority=0)


def _at_exit() -> None:
    if install.taken_over():
        doubts = _counting.doubts()
        words = f"at exit, {_counting.counts()}{_skipped()}{doubts}"
        _counting.log(logging.WARNING if doubts else logging.INFO, words, once="exit")


def _skipped() -> str:
    """Of swap, which slots it skipped, in words; "" if none."""
    if not _counting.counts().answered:
        return ""
    from mxfp4ref.model.skipped import skipped_slots

    try:
        found = skipped_slots()
    except RuntimeError:  # of a GPU that is gone
        return ""
    if not found.calls:
        return ""
    return (
        f"; slots skipped in {found.calls:,} of them: {found.owned_by_none:,} with an id that no rank owns, "
        f"{found.repeated:,} that name an expert a second time"
    )
