"""Hostile input: whatever a public function is given, it gives a right result or names the wrong argument.

How many inputs are tried: every change of one argument alone, of each argument where there are up to three, else
of some, and MXFP4REF_FUZZ_EXAMPLES (default 10) random combinations for each function. The last test prints the
count.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mxfp4ref
from tests.helpers import fuzzing
from tests.helpers.fuzz_targets import TARGETS

EXAMPLES = int(os.environ.get("MXFP4REF_FUZZ_EXAMPLES", "10"))
MANY = 3
counts: dict[str, int] = {}

# Public names that are not fuzzed here, and why.
EXEMPT_MODULES = {
    "mxfp4ref._validate": "the checks that all others use",
    "mxfp4ref._words": "words of messages",
    "mxfp4ref._shown": "how objects show themselves",
    "mxfp4ref._compiled": "how loops are compiled and loaded; they get checked tensors only",
    "mxfp4ref._files": "tests/whole/test_hostile_files.py, tests/conformance/test_writers.py",
    "mxfp4ref._rounding": "takes nothing; tests/whole/test_rounding.py",
    "mxfp4ref._ieee": "arithmetic on checked tensors",
    "mxfp4ref._spans": "called with checked sizes only",
    "mxfp4ref._threads": "called with checked sizes only",
    "mxfp4ref.formats.compiled": "fast ways of formats.mxfp4, quantize and layout, which check",
    "mxfp4ref.formats.layout_loops": "compiled loops, called by formats.compiled only",
    "mxfp4ref.formats.mxfp4_loops": "compiled loops, called by formats.compiled only",
    "mxfp4ref.formats.bytewise": "positions of bytes, called with checked tensors only",
    "mxfp4ref.formats.generations": "records, and look-ups by a name; tests/formats",
    "mxfp4ref.formats.wordwise": "positions of bytes, called with checked tensors only",
    "mxfp4ref.sm90": "the hardware's operations and stages, called with checked tensors only",
    "mxfp4ref.model.gpu": "a way of model.forward on a GPU, called with a checked MoeCall only",
    "mxfp4ref.model.cpu": "a way of model.forward on a CPU, likewise",
    "mxfp4ref.model.rows": "a stage and what sorts its result, called with checked tensors only",
    "mxfp4ref.model.flashinfer_arguments": "takes the arguments of model.flashinfer, which is fuzzed",
    "mxfp4ref.model.humming": "stages, called with checked tensors only, and the tensors of verified files",
    "mxfp4ref.model.skipped": "takes a MoeCall, or nothing",
    "mxfp4ref.model.gpu_trial": "makes its calls itself",
    "mxfp4ref.model.dense": "a stage, called with checked tensors only",
    "mxfp4ref.defects": "wrong pipelines, run on calls that are checked",
    "mxfp4ref.goldens.cases": "definitions of goldens, for their own regeneration; they have no input",
    "mxfp4ref.goldens.case": "made of verified files",
    "mxfp4ref.goldens.manifest": "the wheel's build; tests/whole/test_packaging.py",
    "mxfp4ref.goldens.store": "tests/goldens damages files, manifests and sidecars",
    "mxfp4ref.goldens.archive": "tests/goldens/test_archive.py damages archives",
    "mxfp4ref.goldens.flashinfer_bench": "tests/goldens",
    "mxfp4ref.goldens.writing": "tests/goldens",
    "mxfp4ref.goldens.error": "an exception",
    "mxfp4ref.goldens.matrix": "reads a file beside the goldens; tests/conformance/test_cli.py damages it",
    "mxfp4ref.checkpoint": "tests/checkpoint damages files and tensors; a CheckpointError names them",
    "mxfp4ref.conformance": "takes what `execution` checked; tests/conformance runs kernels that misbehave",
    "mxfp4ref.engine": "tests/engine damages recorded folders and files",
    "mxfp4ref.goldens.hardware_record": "reads files beside the goldens",
    "mxfp4ref.goldens.runs": "runs verified cases",
}
EXEMPT = {
    "_default_device.on_cpu": "has no arguments",
    "model.call.check_rows": "a check of two counts that its callers have read from tensors",
    "model.forward.Stages": "functions to be called; a wrong one fails as it does",
    "model.forward.AnyStages": "functions to be called; a wrong one fails as it does",
    "model.forward.MoeTrace": "a result",
    "model.forward.check_stage": "a check of what stages give",
    "model.forward.activate_rows": "a stage, called with checked tensors only",
    "model.forward.gemm_rows": "a stage, called with checked tensors only",
    "formats.experts.StoredWeights": "a result",
    "formats.humming.PreparedWeights": "a result",
    "formats.humming.PreparationLoss": "a result",
    "formats.humming.e4m3_weights": "of the GEMM, called with checked tensors only",
    "formats.humming.rewrite_table": "a table",
    "model.parallel.serving_ranks": "takes the ids of a Routing and checked Ranks",
    "routing.models.Preset": "a record",
    "routing.route.Gate": "a record, whose tensors `route` checks",
    "routing.route.RoutedScaling": "an enumeration",
    "routing.route.Routing": "a result",
    "routing.route.Tokens": "a record, whose tensors `route` checks",
    "routing.selection.Selection": "a result",
    "goldens.generator.generate": "recipes are part of verified files",
    "goldens.generator.element_rule": "recipes are part of verified files",
}


def public_callables() -> Iterator[str]:
    for found in pkgutil.walk_packages(mxfp4ref.__path__, "mxfp4ref."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("mxfp4ref"):
                yield f"{value.__module__}.{name}"


def test_none_is_forgotten() -> None:
    expected = set()
    for name in public_callables():
        module, short = name.rsplit(".", 1)
        if not any(module == e or module.startswith(e + ".") for e in EXEMPT_MODULES):
            expected.add(f"{module.removeprefix('mxfp4ref.')}.{short}")
    assert expected - set(TARGETS) == set(EXEMPT)


def failures(name: str, changed: dict[str, str], valid: Any) -> list[str]:
    counts[name] = counts.get(name, 0) + 1
    found = fuzzing.problem(TARGETS[name], valid, changed)
    return [f"{changed}: {found}"] if found else []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are small, and other workers want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*(nested|quantized) tensor")  # which are what is passed
@pytest.mark.parametrize("name", TARGETS)
def test_arguments_one_at_a_time_and_together(name: str) -> None:
    target = TARGETS[name]
    arguments = target.arguments()
    valid = target.function(**arguments)
    assert fuzzing.problem(target, valid, {}) == ""
    choices = {
        argument: target.choices(argument, value)
        for argument, value in arguments.items()
        if not target.only or argument in target.only
    }
    found = []
    for number, (argument, changes) in enumerate(choices.items()):
        # Where there are more arguments, each change takes the place of every second or fourth one.
        step = 1 if len(choices) <= MANY else 2 if len(choices) <= 2 * MANY else 4
        for change in changes[number % step :: step]:
            found += failures(name, {argument: change}, valid)
    random_source = random.Random(name)
    for _ in range(EXAMPLES):
        count = random_source.randint(1, min(4, len(choices)))
        together = {
            argument: random_source.choice(choices[argument])
            for argument in random_source.sample(list(choices), count)
        }
        found += failures(name, together, valid)
    assert not found, f"{len(found)} of {counts[name]}:\n" + "\n".join(found[:40])


def test_nothing_is_unpickled_from_files() -> None:
    """A kernel's process unpickles what this one asks, and pytest's what its workers say; nothing else is.

    What a kernel did to pickle itself is put back. torch.load is told to take tensors only.
    """
    root = Path(mxfp4ref.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "allow_pickle=True" not in text, path
        assert (
            path.name in ("kernel_process.py", "worker.py", "pytest_verdict.py", "surroundings.py")
            or "import pickle" not in text
        ), path
        assert path.name in ("kernel_process.py", "pytest_verdict.py") or not re.search(
            r"\bpickle\.loads?", text
        ), path
        for loaded in re.findall(r"(?<!safetensors\.)\btorch\.load\(.*", text):
            assert "weights_only=True" in loaded, path


def test_count(capsys: pytest.CaptureFixture[str]) -> None:
    functions = {name.split(" ")[0].rstrip(",") for name in counts}  # some are there in several ways
    with capsys.disabled():
        print(f"\nfuzz: {sum(counts.values()):,} hostile inputs to {len(functions)} public functions")
