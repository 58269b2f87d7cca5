"""The commands of conformance, a file for each subject; `mxfp4ref.__main__` makes one command of them."""

from __future__ import annotations

from mxfp4ref.conformance.cli.conform import conform
from mxfp4ref.conformance.cli.defects import defects, explain
from mxfp4ref.conformance.cli.goldens import export, regenerate, show, verify
from mxfp4ref.conformance.cli.tensors import compare, layer

__all__ = ["COMMANDS"]

COMMANDS = (conform, verify, regenerate, export, show, compare, layer, defects, explain)
