"""The conformance kit's subcommands of the `mxfp4ref` command, a file for each subject."""

from __future__ import annotations

from mxfp4ref.conformance.cli.about import doctor, list_cases
from mxfp4ref.conformance.cli.archives import archive
from mxfp4ref.conformance.cli.checkpoint_report import checkpoint_report
from mxfp4ref.conformance.cli.checkpoints import checkpoint
from mxfp4ref.conformance.cli.completing import completion
from mxfp4ref.conformance.cli.conform import conform
from mxfp4ref.conformance.cli.defects import defects, explain
from mxfp4ref.conformance.cli.goldens import export, regenerate, show, verify
from mxfp4ref.conformance.cli.init import init
from mxfp4ref.conformance.cli.tensors import compare

__all__ = ["COMMANDS"]

COMMANDS = (
    *(conform, init, list_cases, show, defects, explain, compare, checkpoint, checkpoint_report),
    *(archive, verify, regenerate, export, doctor, completion),
)
