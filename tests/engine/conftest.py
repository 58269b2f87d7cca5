from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfp4ref import engine
from tests.helpers import flashinfer_package


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A flashinfer and engines that can be imported and are not yet; afterwards all is as before."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("flashinfer")}
    monkeypatch.delenv("RANK", raising=False)
    flashinfer_package.use(tmp_path / "site", monkeypatch)
    yield tmp_path
    engine.restore()
    flashinfer_package.forget(monkeypatch)
    monkeypatch.undo()
    sys.modules.update(before)
