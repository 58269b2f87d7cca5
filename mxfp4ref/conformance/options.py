"""How a kernel is compared with the goldens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mxfp4ref._choices import DIAGNOSES, EFFORTS, MODES, STORAGE, Diagnosing, Effort, Mode, Storage
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_below, check_bool, check_choice, check_instance, check_int

__all__ = ["Options", "Search"]


@dataclass(frozen=True)
class Search:
    """How `diagnose` looks for what is wrong.

    Attributes:
        effort: "full", or "quick" for about a second: the likeliest hypotheses only.
        seconds: of the processor, for trying hypotheses, in place of what is usual: "quick" 0.7 (a layer of real size
            4), "full" 40 (60). What is read off the output comes on top of that.
        mode: "exact", or "bounded" for a kernel that may sum in another order.
    """

    effort: Effort = "full"
    seconds: float | None = None
    mode: Mode = "exact"

    def __post_init__(self) -> None:
        check_choice("effort", self.effort, EFFORTS)
        check_choice("mode", self.mode, MODES)
        check_below("seconds", self.seconds, 1e9, "seconds, above 0 and below 10^9")


@dataclass(frozen=True, repr=False)
class Options(Shown):
    """How a kernel is compared with the goldens.

    Attributes:
        mode: "exact" or "bounded".
        storage, confidence: which bounds, as in `bounds.bound`; in mode bounded only.
        timeout: seconds a run may take; None for no limit. `execution` says what becomes of one that takes longer.
        repeat: run each case a second time and compare the bits (not the stand-ins on whole-size layers).
        all_tactics: run each case by every tile and cluster of either GEMM, the other one's being the default.
        diagnosis: where bits differ, look for what is wrong: "quick", about a second for each case as it comes;
            "full", at the end also up to a minute for all of them together; "none", only compare.
        dump: a folder for reproducers of the cases that fail.
        max_failures: how many cases may fail before the rest is left out; None for no limit. Those that lie within
            the bounds of a correct evaluation in another order do not count: they may be no mistake, and tell little.
            While no diagnosis predicts every bit of any that does, two more may.
        jobs: how many cases run side by side, each in a process of its own, with a share of torch's threads.
    """

    _WHOLE: ClassVar[bool] = True

    mode: Mode = "exact"
    storage: Storage = "wider"
    confidence: float | None = None
    timeout: float | None = None
    repeat: bool = True
    all_tactics: bool = False
    diagnosis: Diagnosing = "full"
    dump: Path | None = None
    max_failures: int | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("storage", self.storage, STORAGE)
        check_choice("diagnosis", self.diagnosis, DIAGNOSES)
        check_below("confidence", self.confidence, 1, "a probability between 0 and 1")
        check_below("timeout", self.timeout, 1e9, "seconds, above 0 and below 10^9")  # as threads take them
        if self.mode == "exact":
            for name, usual in (("storage", "wider"), ("confidence", None)):
                if (value := getattr(self, name)) != usual:
                    raise ValueError(
                        f"{name}: expected mode bounded, or {usual} in mode exact, which has no bounds, got {value!r}"
                    )
        for name in ("repeat", "all_tactics"):
            check_bool(name, getattr(self, name))
        if self.dump is not None:
            check_instance("dump", self.dump, Path)
        check_int("jobs", self.jobs, minimum=1)
        if self.max_failures is not None:
            check_int("max_failures", self.max_failures, minimum=1)
