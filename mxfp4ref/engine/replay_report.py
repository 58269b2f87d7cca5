"""How recorded calls are replayed, and what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mxfp4ref._choices import DIAGNOSES, MODES, Diagnosing, Mode
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_below, check_bool, check_choice, check_instance, check_int
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.results import CaseResult, Report
from mxfp4ref.engine.unshown import unshown

__all__ = ["ReplayOptions", "ReplayReport", "ReplayResult"]

_STATUS_OF_MANY = {"differs": "differ"}


@dataclass(frozen=True, repr=False)
class ReplayOptions(Shown):
    """How recorded calls are compared.

    Attributes:
        autotune_cache: flashinfer's autotune cache, file or folder, whose tactics are held against the bits.
        any_tile: stop at the first pair of K tiles that fits, instead of trying all.
        diagnosis: where bits differ, look for what is wrong: "quick", about a second for each call; "full", up to a
            minute; "none", only compare.
        max_calls: replay no more calls, the first ones; None for all.
        mode: "exact", equal bits; "bounded", within the bounds of every correct evaluation.
        kernel: runs on the recorded inputs, and its output takes the place of the recorded one; named as in
            `conformance.run`, and in a process of its own.
        device: where the kernel's tensors go.
        timeout: seconds for each call of the kernel; None for no limit.
    """

    _WHOLE: ClassVar[bool] = True

    autotune_cache: Path | None = None
    any_tile: bool = False
    diagnosis: Diagnosing = "full"
    max_calls: int | None = None
    mode: Mode = "exact"
    kernel: str | None = None
    device: str | None = None
    timeout: float | None = 600.0

    def __post_init__(self) -> None:
        check_choice("diagnosis", self.diagnosis, DIAGNOSES)
        check_choice("mode", self.mode, MODES)
        check_bool("any_tile", self.any_tile)
        for name, wanted in (("autotune_cache", Path), ("kernel", str), ("device", str)):
            if (value := getattr(self, name)) is not None:
                check_instance(name, value, wanted)
        check_below("timeout", self.timeout, 1e9, "seconds, above 0 and below 10^9")  # as threads take them
        if self.kernel is None and self.device is not None:
            raise ValueError(f"device: expected kernel with it, got {self.device!r} alone")
        if self.max_calls is not None:
            check_int("max_calls", self.max_calls, minimum=1)


@dataclass(frozen=True, repr=False)
class ReplayResult(CaseResult):
    """What came of one recorded call.

    `status` is "equal"; "differs"; in mode bounded "within bounds" or "outside bounds"; "wrong tactic", if the bits
    are right for other tiles than were predicted; "unclear", if a CUDA graph may have overwritten what was recorded;
    "skipped", if the call is not modelled, lacks its output, or was overwritten by a CUDA graph; "refused", if such
    arguments are; "wrong output"; "unreadable"; or what a kernel did instead of answering, as in `CaseResult`.

    Attributes:
        layer: the number of the experts, by their weights; 0 if they were not read.
        other: the activation's parameters (`swiglu_limit`, ...) that are not those of the layer's first call.
        tokens: M.
        predicted: the tactics that the call or the autotune cache names.
        shown: of a call that is equal, as `unshown.shown` gives it; without what an earlier one showed.
        all_zero: whether no output element is other than zero, so that the call alone proves nothing.
        local_ids: whether no id is the rank's, and all look as if they were local ones.
        own: whether this package's function gave the output that was compared, so that equal tells of no kernel.
    """

    layer: int = 0
    tokens: int = 0
    predicted: str = ""
    all_zero: bool = False
    local_ids: bool = False
    own: bool = False
    other: tuple[str, ...] = ()
    shown: Mapping[str, bool] = field(default_factory=dict)

    @property
    def proves_nothing(self) -> bool:
        return self.ok and self.status != "skipped" and (self.all_zero or not self.elements)


_HANDED = " So the kernel computed what it was handed; whether that is the layer's, `mxfp4ref layer --served` tells."


@dataclass(frozen=True, repr=False)
class ReplayReport(Report):
    """The results of a replay; `kernel` is the folder, or the kernel that ran on the calls in it."""

    @property
    def outcome(self) -> str:
        """The result without what is wrong."""
        counts = Counter(result.status for result in self.results)
        layers = len({r.layer for r in self.results if isinstance(r, ReplayResult)} - {0})
        words = f"{self.kernel}: interrupted, no verdict; " if self.interrupted else ""
        words += f"{self.kernel} on " if "--kernel" in self.arguments else ""
        words += f"{counted(len(self.results), 'recorded call')} of {counted(layers, 'layer')}{': ' * bool(counts)}"
        words += (
            ", ".join(
                f"{count} {_STATUS_OF_MANY.get(status, status) if count > 1 else status}"
                for status, count in counts.items()
            )
            + "."
        )
        replayed = [r for r in self.results if isinstance(r, ReplayResult)]
        if predicted := [r for r in replayed if r.predicted and r.status in ("equal", "wrong tactic")]:
            held = sum(r.ok for r in predicted)
            words += f" {held} of {counted(len(predicted), 'prediction')} of tactics held."
        if zeros := sum(r.all_zero for r in replayed):
            words += f" {zeros} gave zeros only, which proves nothing."
        if own := sum(r.own for r in replayed):
            words += f" This package's own function gave {own}: that tells nothing of a kernel."
        if local := sum(r.local_ids for r in replayed):
            words += f" Are the ids of {counted(local, 'call')} local already? The kernel takes global ones."
        words += "".join(f" {sentence}" for sentence in unshown([r.shown for r in replayed]))
        for parameters, count in Counter(r.other for r in replayed if r.other).items():
            words += f" {counted(count, 'call')} {'has' if count == 1 else 'have'} another "
            words += f"{' and '.join(parameters)} than the first of the layer."
        words += f" {self.left} more were not replayed." if self.left else ""
        of_a_kernel = not own and "--kernel" not in self.arguments
        if set(counts) == {"equal"} and of_a_kernel and not zeros and not local:
            words += _HANDED
        return words

    @property
    def unfinished(self) -> str:
        return ""  # no call that fails ends a replay
