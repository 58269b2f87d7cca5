"""What a build does beside packing the package: it adds the built-in goldens, cut out of `goldens/`."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuiltinGoldens(BuildHookInterface):  # type: ignore[type-arg]
    """Adds them as `mxfp4ref/goldens/builtin` to a wheel, and as all the `goldens/` there are to a source archive.

    An editable install finds all goldens in its checkout.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()  # kept until the archive is packed
        root = Path(self.root)
        write_builtin = runpy.run_path(str(root / "mxfp4ref" / "goldens" / "manifest.py"))["write_builtin"]
        write_builtin(root / "goldens", Path(self._folder.name))
        inside = "mxfp4ref/goldens/builtin" if self.target_name == "wheel" else "goldens"
        build_data["force_include"][self._folder.name] = inside

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()
