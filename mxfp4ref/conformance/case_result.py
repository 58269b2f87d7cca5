"""What came of one case of a conformance run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from mxfp4ref._files import printable
from mxfp4ref._shown import Shown
from mxfp4ref.conformance.comparison import FAR
from mxfp4ref.conformance.diagnosis import Diagnosis

__all__ = ["PASSING", "RECORDING", "STATE", "CaseResult", "enough"]

PASSING = ("equal", "within bounds", "skipped")
_FURTHER = 2  # cases that are run beyond a limit of failures, while what is wrong is unknown
STATE = "the kernel keeps state between calls, or chance decides"  # in the message of a result
RECORDING = "recording"  # the kind of a call that was recorded elsewhere, which is no golden case


@dataclass(frozen=True, repr=False)
class CaseResult(Shown):
    """What came of one case.

    Attributes:
        case, kind, why: of the golden case; of a recording its name, `RECORDING`, and what call it is.
        status: "equal", "within bounds", "differs", "outside bounds", or one of `execution.PROBLEMS`.
        tiles: the K tiles ("128x256", for GEMM1 and GEMM2) whose expected output the kernel's equals; the tactics
            where all were run.
        elements, differing: output elements compared and how many differ; in mode "bounded", and where no pair
            of tiles agrees, from the closest expected output.
        outside: elements outside their bounds, in mode "bounded".
        within_bounds: of a call or a router that differs in mode "exact", whether it stays within the bounds of mode
            "bounded"; None where that was not asked, as of large calls, or special values alone lie outside.
        message: the problem, in words.
        diagnosis: of the first run that differs, and in it of one output.
        runs, diagnosed_run: how many runs were compared, and of several the K tiles, or tactics, of the one that the
            diagnosis is of.
        kernel_seconds: for all runs of the kernel, with what is done to hand over a case and to get its outputs.
        comparison_seconds: for expected outputs, bounds and reproducers.
        diagnosis_seconds: for a diagnosis of this case alone.
    """

    case: str
    kind: str
    why: str
    status: str
    tiles: tuple[str, ...] = ()
    elements: int = 0
    differing: int = 0
    outside: int = 0
    message: str = ""
    diagnosis: Diagnosis | None = None
    kernel_seconds: float = 0.0
    comparison_seconds: float = 0.0
    diagnosis_seconds: float = 0.0
    runs: int = 1
    diagnosed_run: str = ""
    within_bounds: bool | None = None

    def __post_init__(self) -> None:
        for name in ("case", "why", "message"):  # text of files and kernels, to be shown anywhere
            object.__setattr__(self, name, printable(getattr(self, name), lines=False))

    @property
    def ok(self) -> bool:
        return self.status in PASSING

    @property
    def fails_outright(self) -> bool:
        """Whether it fails, and not as a correct evaluation in another order would, which may be no mistake."""
        return not self.ok and not self.within_bounds

    @property
    def proves_nothing(self) -> bool:
        """Whether it passed, and any kernel would have."""
        return False

    @property
    def compared(self) -> bool:
        """Whether an element was compared, or the case failed before that."""
        return self.status != "skipped" and (self.elements > 0 or not self.ok)

    @property
    def untelling(self) -> tuple[bool | float, ...]:
        """By which failing cases are sorted, those that tell most first: known to be wrong, explained, of numbers."""
        found = self.diagnosis
        no_number = found is None or any(count for top, count in found.ulps if top >= FAR)
        return bool(self.within_bounds), found is None or not found.finding.sentence, no_number

    @property
    def seconds(self) -> float:
        """All that the case took."""
        return self.kernel_seconds + self.comparison_seconds + self.diagnosis_seconds

    @property
    def diagnosed_part(self) -> str:
        """Of which output and run the numbers of the diagnosis are, in words; "" if of all that was compared."""
        found = self.diagnosis
        if found is None or found.bins.numel() == self.elements:
            return ""
        run = f", tiles {self.diagnosed_run}, one of {self.runs} runs" if self.diagnosed_run else ""
        return f"{found.output}{run}"

    def lasting(self, kernel: float = 0.0, comparison: float = 0.0, diagnosis: float = 0.0) -> Self:
        """The result, with so many more seconds."""
        return replace(
            self,
            kernel_seconds=self.kernel_seconds + kernel,
            comparison_seconds=self.comparison_seconds + comparison,
            diagnosis_seconds=self.diagnosis_seconds + diagnosis,
        )


def enough(outright: Sequence[CaseResult], limit: int | None) -> bool:
    """Whether so many cases have failed outright that the others are left out.

    Where no diagnosis predicts every bit of any of them, a few more are run: cases differ in how much they tell.
    """
    if limit is None or len(outright) < limit:
        return False
    unknown = all(r.diagnosis is not None and not r.diagnosis.finding.exact for r in outright)
    return len(outright) >= limit + _FURTHER * unknown
