"""What the failing tests of a session of pytest say together, as in `conform`, whichever process each ran in."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mxfp4ref._choices import Diagnosing
from mxfp4ref.conformance.diagnosing import Failed, Failing, Found
from mxfp4ref.conformance.heartbeat import ALL_TOGETHER, heartbeat, told_to
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.goldens import Goldens
from mxfp4ref.goldens.runs import runs

__all__ = ["Kept", "verdict"]


@dataclass(frozen=True)
class Kept:
    """What a call gave that fails, without its inputs, which every process has in the goldens."""

    tiles: str
    outputs: Mapping[str, Tensor]
    outside: Tensor | None

    @classmethod
    def of(cls, failed: Failed | None, generation: Generation) -> Kept | None:
        """Of a call that is diagnosed together with others and has the goldens' expected output."""
        if failed is None or not failed.together or generation is not NEWEST:
            return None
        outputs = {name: tensor.cpu() for name, tensor in failed.outputs.items()}
        return cls(failed.run.tiles, outputs, None if failed.outside is None else failed.outside.cpu())

    def failed(self, case: str, goldens: Goldens) -> Failed:
        """All that is to be diagnosed."""
        loaded = goldens.load(case)
        run = next(one for one in runs(loaded) if one.tiles == self.tiles)
        return Failed(loaded.kind, run, self.outputs, self.outside)


def verdict(
    results: Sequence[tuple[CaseResult, Kept | None]],
    goldens: Goldens,
    diagnosis: Diagnosing,
    *,
    search: bool,
) -> Found:
    """What all results come to, with what was kept of each; `search` for what they may say together."""
    failing = Failing(diagnosis)
    for result, kept in results if search and diagnosis == "full" else ():
        if kept is not None:
            failing.add(result, kept.failed(result.case, goldens))
    with heartbeat(lambda words: print(words, file=sys.stderr, flush=True)) as now:
        now(ALL_TOGETHER)
        with told_to(
            lambda words, seconds: now(f"all together: {words}, {max(seconds, 1):.0f} s more at most")
        ):
            return failing.verdict([result for result, _ in results], goldens, search=search)
