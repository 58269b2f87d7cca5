"""What is wrong, from the bits alone: where, since which stage, and which named defect predicts exactly this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import EFFORTS, Effort
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_choice, check_function
from mxfp4ref.conformance.bounds.bounded import where_outside
from mxfp4ref.conformance.bounds.call_bounds import specials_alone
from mxfp4ref.conformance.comparison import FAR, Difference, difference_at, differing, ulp_distance
from mxfp4ref.conformance.families.hypothesis import UNKNOWN, Finding, Hypothesis
from mxfp4ref.conformance.findings.attribution import Attribution, attribution
from mxfp4ref.conformance.findings.exposed import exposed
from mxfp4ref.conformance.findings.feeding import feeds_of, feeds_of_quantizer
from mxfp4ref.conformance.findings.finding import WITHIN, Evidence, counted, of_nan_bits, of_specials
from mxfp4ref.conformance.findings.guarded import guarded, listening
from mxfp4ref.conformance.findings.patterns import Pattern, patterns
from mxfp4ref.conformance.findings.reach import reached
from mxfp4ref.conformance.findings.reduction import local_experts, one_token
from mxfp4ref.conformance.findings.stage_fit import Reach, Reconciled, reconcile
from mxfp4ref.conformance.findings.suspects import (
    Prediction,
    Progress,
    named_finding,
    predict,
    predicted_by,
    special_predictions,
)
from mxfp4ref.conformance.looking import REAL_SECONDS, SECONDS, HowToLook, Known, is_large, look
from mxfp4ref.conformance.options import Search
from mxfp4ref.conformance.question import checked_suspects, checked_tensors
from mxfp4ref.conformance.shown_progress import shown_progress
from mxfp4ref.conformance.stage_words import finding_of_stage
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace

__all__ = [
    "ULP_BINS",
    "Diagnosis",
    "Finding",
    "Located",
    "NothingDiffers",
    "Prediction",
    "diagnose",
    "predict",
    "ulp_bins",
]

_MANY = 0.25  # of the elements
_FEW = 8  # wrong elements, that a mistake may predict by chance
ULP_BINS = (1, 2, 4, 16, 256, FAR - 1, FAR)  # the largest distance of each; the last is that with a NaN


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """Everything that can be said of one output that differs.

    Attributes:
        output: the name of the output.
        first: the first element that differs.
        feeds: the inputs that feed it, in words.
        patterns: what the places that differ have in common, in words; in mode bounded, those outside their bounds.
        stage: the stage up to which the output can be reconciled with the trace, in words.
        reach: what that says, as of `stage_fit.Reconciled`; "" where the finding says more.
        predictions: the defects that predict the output exactly, or else up to three that come closest, with more of
            the wrong bits than chance gives (`suspects.NOISE`).
        ulps: elements by distance: (up to this many ulps, how many); the last with NaN.
        bins: how far the output differs, `uint8` like it: 0 where the bits are equal, else which of `ulps`, from 1.
        finding: what is wrong, in words, and in which stage, as far as it is known.
        attribution: which share of the elements differs by expert, by rows, by columns, the most telling first; in
            mode bounded, which share lies outside its bounds.
        experts: of a kernel call, the ids of the experts that each token has on this rank, `[M, k]`, else -1.
        places: the patterns that say where it differs, as other cases may, without how many places there are in all.
    """

    output: str
    first: Difference
    feeds: tuple[str, ...]
    patterns: tuple[str, ...]
    stage: str
    predictions: tuple[Prediction, ...]
    ulps: tuple[tuple[int, int], ...]
    bins: Tensor
    finding: Finding = UNKNOWN
    attribution: tuple[Attribution, ...] = ()
    experts: Tensor | None = None
    reach: Reach = ""
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a report says of it, in whole sentences."""
        from mxfp4ref.conformance.reports.report_text import diagnosis_lines

        return "\n".join(diagnosis_lines(self))

    @property
    def mask(self) -> Tensor:
        """Where the output differs, `bool` like it."""
        return self.bins > 0

    @property
    def proof(self) -> str:
        """What the finding rests on, in words."""
        if not self.finding.exact:
            return (
                "all ids and weights, up to roundings" if self.finding.stages == ("routing",) else "evidence"
            )
        wrong = int(self.mask.sum())
        few = f", but {wrong} {'is' if wrong == 1 else 'are'} few: another mistake may give the same"
        return "every wrong bit" + few * (wrong < _FEW)

    @property
    def exact(self) -> tuple[str, ...]:
        """The defects that predict exactly these bits."""
        return tuple(p.name for p in self.predictions if p.exact)


class NothingDiffers(ValueError):
    """The outputs have the expected bits: there is nothing to diagnose."""


def diagnose(
    kind: str,
    inputs: Any,
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    suspects: Iterable[str | Hypothesis] | None = None,
    diagnosis: Effort | Search = "full",
    progress: Progress | None = None,
) -> Diagnosis:
    """Say how and why `outputs` differ from `expected`; NothingDiffers is raised where they do not.

    Args:
        kind: the golden case's kind.
        inputs: a `MoeCall` for kind "moe", else arguments by name.
        outputs: what the kernel gave, and any intermediates under the names of `MoeTrace`.
        expected: what it should have given.
        suspects: names of defects, and hypotheses, to try before all others, which are tried if none is exact.
        diagnosis: "full", or "quick" for about a second: the likeliest hypotheses only; or a `Search`, for a limit
            and the mode.
        progress: called before each named defect that is tried on a call, with its name and how many there are; by
            default a bar on stderr, if that is a terminal.

    Raises:
        NothingDiffers: all outputs equal those expected, in every bit; in mode bounded, all of a call's output lies
            within the bounds of a correct evaluation in another order. It is a ValueError.
        TypeError, ValueError: an argument is wrong, an output missing, or its dtype or shape not that of the inputs'.
    """
    outputs, expected = checked_tensors(kind, inputs, outputs, expected)
    some = checked_suspects(suspects)
    check_function("progress", progress)
    if not isinstance(diagnosis, Search):
        check_choice("diagnosis", diagnosis, EFFORTS)
        diagnosis = Search(diagnosis)
    outside = None
    if diagnosis.mode == "bounded" and kind == "moe":
        outside = where_outside(Run("", inputs, expected), outputs)
    located = Located(kind, inputs, outputs, expected, outside)
    if outside is not None and not bool(outside.any()):
        differ = f"{int(located.mask.sum()):,} of {counted(located.mask.numel(), 'element')} differ"
        many = "; so many as few orders of summation make differ: mode exact may say more"
        share = float(located.mask.double().mean())
        raise NothingDiffers(
            f"nothing is wrong in mode bounded: {differ}, all {WITHIN}{many * (share > _MANY)}"
        )
    with shown_progress(progress) as told:
        known = located.search(
            some,
            diagnosis.effort,
            seconds=diagnosis.seconds,
            limit=diagnosis.seconds,
            progress=told,
        )
    return located.told(known)


class Located:
    """An output that differs, and what is said of it without a search; arguments and errors as of `diagnose`.

    Of a call in mode bounded, `outside` is where it leaves its bounds, `[M, H] bool`: these elements alone are wrong,
    and counted. What differs within bounds is shown in `bins` alone. `special` is whether special values alone are
    wrong, `nan_bits` whether the bits of NaN alone are.
    """

    def __init__(
        self,
        kind: str,
        inputs: Any,
        outputs: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        outside: Tensor | None = None,
    ) -> None:
        name = next((n for n in expected if bool(differing(outputs[n], expected[n]).any())), None)
        if name is None:
            if not (elements := sum(tensor.numel() for tensor in expected.values())):
                raise ValueError("expected: expected a tensor with elements, got none")
            raise NothingDiffers(
                f"nothing differs: {', '.join(expected)}: all {counted(elements, 'element')} have the expected bits"
            )
        self.kind, self.inputs, self.outputs, self.expected = kind, inputs, outputs, expected
        self.got, self.want = outputs[name], expected[name]
        self.found: list[Hypothesis] = []  # by a search, those that predict every bit
        mask = differing(self.got, self.want)
        self._outside = outside if outside is not None and bool(outside.any()) else None
        self._wrong = mask if self._outside is None else self._outside
        self.special = self._outside is not None and specials_alone(inputs, self.got, self._outside)
        self.nan_bits = kind == "moe" and bool((self.got.isnan() & self.want.isnan())[self._wrong].all())
        first = difference_at(self.got, self.want, tuple(self._wrong.nonzero()[0].tolist()))
        feeds: tuple[str, ...] = ()
        found: tuple[Pattern, ...] = ()
        table: tuple[Attribution, ...] = ()
        experts = None
        if isinstance(inputs, MoeCall):
            token = first.index[0]
            one = trace(one_token(inputs, token))
            feeds = feeds_of(inputs, one, token, first.index[1])
            could = reached(inputs, self.want, self._wrong)
            failed: dict[str, None] = {}
            with listening(failed):
                found = guarded(patterns, inputs, self.got, self.want, self._wrong, could) or ()
                table = guarded(attribution, inputs, self._wrong, could) or ()
            found += tuple(map(Pattern, failed))
            local = local_experts(inputs)
            experts = torch.where(local < 0, -1, local + inputs.ep_rank * inputs.experts.num_experts).cpu()
        elif kind == "quantize":
            feeds = feeds_of_quantizer(inputs["values"].cpu(), first.index, name)
        elif kind == "layout":
            found = (Pattern(_layout_pattern(self.got, self.want, mask)),)
        bins = ulp_bins(self.got, self.want, mask)
        counts = torch.bincount(bins.flatten().to(torch.int64), minlength=len(ULP_BINS) + 1).tolist()
        ulps = tuple(zip(ULP_BINS, counts[1:], strict=True))
        what = "outside bounds: " * (self._outside is not None)
        said = tuple(f"{what}{p.words}" for p in found)
        places = tuple(f"{what}{p.place}" for p in found if p.place)
        self._plain = Diagnosis(
            name, first, feeds, said, "", (), ulps, bins, attribution=table, experts=experts, places=places
        )

    @property
    def large(self) -> bool:
        """Whether what is solved for and bounded takes longer than a quick diagnosis may."""
        return is_large(self.inputs, self.got)

    @property
    def zeros(self) -> bool:
        """Whether every row that differs is zero."""
        return not bool(self.got[self._plain.mask.any(-1)].any())

    @property
    def blank(self) -> bool:
        """Whether zeros, or no numbers, came wherever it differs: much gives those, so that they name nothing."""
        got, want = self.got[self._plain.mask], self.want[self._plain.mask]
        return bool(((got == 0) | ~got.isfinite()).all() & want.isfinite().all())

    def search(
        self,
        suspects: tuple[str | Hypothesis, ...],
        diagnosis: str,
        *,
        seconds: float | None = None,
        limit: float | None = None,
        progress: Progress | None = None,
    ) -> Known:
        """Look for what is wrong, as `diagnose` does.

        `seconds` is for hypotheses, and `limit` for all on a layer of real size, if they are not what is usual.
        """
        prepared_for_fp8 = isinstance(self.inputs, MoeCall) and isinstance(
            self.inputs.experts, HummingExperts
        )
        if not isinstance(self.inputs, MoeCall) or prepared_for_fp8:
            kind = "w4a8" if prepared_for_fp8 else self.kind
            predictions = predicted_by(kind, self.inputs, self.outputs, self.expected)
            if (named := named_finding(predictions)).exact:
                return predictions, named, ()
            in_words = finding_of_stage(kind, self.inputs, self.outputs, self.expected)
            if in_words is not None and in_words.sentence and (in_words.exact or kind == "routing"):
                predictions = ()  # what predicts fewer bits than the sentence explains is no more than doubt
            return predictions, in_words or named, ()
        if not self.inputs.experts.tactics_show:  # no MXFP4 weights, of which all hypotheses are
            return (), Finding(), ()
        if self.nan_bits:
            bits = torch.unique(
                self.got[self.got.isnan()].view(torch.int16).to(torch.int32) & 0xFFFF
            ).tolist()
            named_so = f"nan_as_{bits[0]:04x}" if len(bits) == 1 else ""
            predictions = (Prediction(named_so, 1.0, True),) if named_so in DEFECTS else ()
            return predictions, named_finding(predictions) if predictions else of_nan_bits(bits), ()
        if self.special:
            predictions = special_predictions(self.inputs, self.outputs, self.expected)
            return predictions, named_finding(predictions) if predictions else of_specials(), ()
        shown = exposed(self.inputs, self.outputs)
        seen = Evidence((shown.stage,), shown.words, 3) if shown is not None else None
        seconds = SECONDS[diagnosis] if seconds is None else seconds
        limit = REAL_SECONDS[diagnosis] if limit is None else limit
        how = HowToLook(suspects, diagnosis, seconds, limit, progress, seen, self.found, self._outside)
        return look(self.inputs, self.got, self.want, how)

    @property
    def mask(self) -> Tensor:
        """Where the output differs."""
        return self._plain.mask

    def told(self, known: Known, *, brief: bool = False) -> Diagnosis:
        """The diagnosis, with what was found; if `brief`, without the bounds of each stage, which take long."""
        predictions, finding, remarks = known
        said = self._plain.patterns + remarks
        found = replace(self._plain, predictions=predictions, finding=finding, patterns=said)
        if not isinstance(self.inputs, MoeCall):
            return found
        stage = self._stage(finding, brief)
        return replace(found, stage=stage.words, reach=stage.reach)

    def _stage(self, finding: Finding, brief: bool) -> Reconciled:
        if finding.exact:
            stages = " or ".join(finding.stages)
            return Reconciled(f"{stages}: every wrong bit is predicted" if stages else "")
        if finding.sentence or brief:
            return Reconciled(finding.sentence)
        return self._reconciled()

    def _reconciled(self) -> Reconciled:
        return reconcile(self.inputs, self.outputs, self._wrong)


def _layout_pattern(got: Tensor, want: Tensor, mask: Tensor) -> str:
    same = torch.equal(got.flatten().sort().values, want.flatten().sort().values)
    kept = "the same bytes in another order" if same else "bytes that are not in the expected tensor"
    return f"{int(mask.sum()):,} of {mask.numel():,} bytes differ: {kept}"


def ulp_bins(got: Tensor, want: Tensor, mask: Tensor) -> Tensor:
    """Which of `ULP_BINS` each element's distance falls into, from 1; 0 outside the mask. `uint8`, on the CPU."""
    distance = ulp_distance(got, want)
    bins = torch.bucketize(distance, torch.tensor(ULP_BINS, device=distance.device)) + 1
    return torch.where(mask, bins, 0).to(torch.uint8).cpu()
