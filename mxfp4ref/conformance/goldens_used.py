"""Which goldens a kernel was compared with, and how many of all that there are."""

from __future__ import annotations

from dataclasses import dataclass

from mxfp4ref._files import printable
from mxfp4ref.goldens import Case, GoldenError, Goldens
from mxfp4ref.goldens.manifest import FORMAT
from mxfp4ref.goldens.store import FETCH

__all__ = ["GoldensUsed", "goldens_used", "load_unchanged"]


@dataclass(frozen=True)
class GoldensUsed:
    """Which goldens a kernel was compared with.

    Attributes:
        path: their folder.
        format: of their files.
        sha256: of their manifest, which has the SHA-256 of every file.
        cases: how many there are.
        of: how many the whole suite has, of which they may be the few that a wheel brings; 0 if they are all.
    """

    path: str
    format: str
    sha256: str
    cases: int
    of: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", printable(self.path, lines=False))

    @property
    def missing(self) -> int:
        """How many cases of the suite are not among them."""
        return max(self.of - self.cases, 0)

    @property
    def count(self) -> str:
        """How many they are: "190 cases", "13 of the suite's 190 cases"."""
        return f"{self.cases} of the suite's {self.of} cases" if self.missing else f"{self.cases} cases"

    def scope(self, ran: int) -> str:
        """Of how many the cases that ran are some, after other words; "" if they are all."""
        if self.missing:
            return f", of the goldens' {self.of}, of which {self.cases} are built in"
        return f", of the goldens' {self.cases}" if ran < self.cases else ""

    @property
    def unseen(self) -> str:
        """That there are more, and how to get them, as a sentence after others; "" if there are none."""
        if not self.missing:
            return ""
        pack = "`mxfp4ref goldens pack goldens.tar` in a checkout writes all"
        return f" What only the other {self.missing} show goes unseen; {pack}, and this gets them: {FETCH}"


def goldens_used(goldens: Goldens) -> GoldensUsed:
    """Which they are, for a report."""
    return GoldensUsed(str(goldens.root), FORMAT, goldens.sha256, len(goldens.entries), goldens.of)


def load_unchanged(goldens: Goldens, name: str, sha256: str) -> Case:
    """A case of goldens whose manifest had this SHA-256 before the kernel under test ran.

    Raises:
        GoldenError: as `Goldens.load`; or they were changed meanwhile, by whomever: a verdict is on one set of them.
    """
    case = goldens.load(name)
    if goldens.sha256 != sha256:
        raise GoldenError(
            f"{goldens.root}: expected goldens that stay as they are while a kernel is compared with them, got "
            "another manifest than at first: something, maybe the kernel, has rewritten them"
        )
    return case
