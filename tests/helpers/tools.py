"""The scripts of `tools/`, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_tool"]

_TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(path: str) -> ModuleType:
    """A script as a module, by its path in that folder."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, _TOOLS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
