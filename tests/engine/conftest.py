from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfp4ref import engine
from tests.helpers import flashinfer_package


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A flashinfer and engines that can be imported and are not yet, in the folder "site"."""
    monkeypatch.delenv("RANK", raising=False)
    with flashinfer_package.importable(tmp_path / "site"):
        yield tmp_path
        engine.restore()
