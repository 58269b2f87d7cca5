"""Whoever holds flashinfer's function, however and since whenever, gets the oracle, and the kernel back."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from mxfp4ref import engine
from mxfp4ref.engine import install
from tests.helpers import bits
from tests.helpers.drop_in import EXPECTED, SM90_CALL, arguments_of
from tests.helpers.flashinfer_package import ENGINES

ARGUMENTS = arguments_of(SM90_CALL)


def is_real(result: Any) -> bool:
    return isinstance(result, tuple) and result[0] == "the real kernel"


def is_oracle(result: Any) -> bool:
    if is_real(result):
        return False
    assert len(result) == 1
    bits.assert_same(result[0], EXPECTED)
    return True


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("imported", ["before", "before and called", "after"])
@pytest.mark.usefixtures("flashinfer")
def test_every_holder_gets_the_oracle_and_the_kernel_back(name: str, imported: str) -> None:
    if imported != "after":
        holder = importlib.import_module(name)
        if imported == "before and called":
            assert is_real(holder.call(**ARGUMENTS))
    engine.swap()
    assert ("flashinfer" in sys.modules) == (imported != "after" and name != "engine_of_caches") or (
        imported == "before and called"
    )
    holder = importlib.import_module(name)
    assert is_oracle(holder.call(**ARGUMENTS))
    if name == "engine_of_names":
        assert is_oracle(holder.call_of_layer(**ARGUMENTS))
    engine.restore()
    assert is_real(holder.call(**ARGUMENTS))
    engine.restore()
    assert engine.counts().answered == engine.counts().calls == 1 + (name == "engine_of_names")


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_package_with_a_function_of_its_own_around_cores(flashinfer: Path, imported: str) -> None:
    """Either is what users may call, and is answered; a call of one by the other is a part of it."""
    (flashinfer / "site/flashinfer/fused_moe/__init__.py").write_text(
        "from . import core\ndef cutlass_fused_moe(*arguments, **named):\n"
        "    return core.cutlass_fused_moe(*arguments, **named)\n"
    )
    if imported == "before":
        importlib.import_module("flashinfer")
    engine.swap()
    outer = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
    inner = importlib.import_module("flashinfer.fused_moe.core").cutlass_fused_moe
    assert is_oracle(outer(**ARGUMENTS))
    assert is_oracle(inner(**ARGUMENTS))
    assert is_real(outer(**ARGUMENTS, enable_cuda_graph=True))
    assert (engine.counts().answered, engine.counts().not_modelled, engine.counts().calls) == (2, 1, 3)
    engine.restore()
    assert is_real(outer(**ARGUMENTS))
    assert is_real(inner(**ARGUMENTS))


@pytest.mark.usefixtures("flashinfer")
def test_restored_before_flashinfer_is_imported() -> None:
    before = list(sys.meta_path)
    engine.swap()
    engine.swap()
    assert len(sys.meta_path) == len(before) + 1
    engine.restore()
    assert sys.meta_path == before
    assert is_real(importlib.import_module("engine_of_names").call(**ARGUMENTS))


def test_restored_while_flashinfer_is_imported(flashinfer: Path) -> None:
    with (flashinfer / "site/flashinfer/fused_moe/__init__.py").open("a") as file:
        file.write("import mxfp4ref.engine\nmxfp4ref.engine.restore()\n")
    engine.swap()
    assert is_real(importlib.import_module("engine_of_names").call(**ARGUMENTS))


@pytest.mark.usefixtures("flashinfer")
def test_the_function_keeps_its_name_signature_and_attributes() -> None:
    function = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
    before = inspect.signature(function), function.__code__, dict(vars(function))
    engine.swap()
    assert (function.__name__, inspect.signature(function)) == ("cutlass_fused_moe", before[0])
    assert function.__code__ is not before[1]
    engine.restore()
    assert (inspect.signature(function), function.__code__, vars(function)) == before


@pytest.mark.usefixtures("flashinfer")
def test_a_function_without_cells() -> None:
    core = importlib.import_module("flashinfer.fused_moe")
    calls = []

    def plain(x: int, y: int = 2, *, z: int = 3) -> tuple[int, int, int]:
        return x, y, z

    core.cutlass_fused_moe = plain
    install.install(lambda: lambda kernel, arguments, named: calls.append((arguments, named)) or kernel(5))
    assert [plain(1, z=4) for _ in range(30)] == [(5, 2, 3)] * 30
    assert calls == [((1,), {"z": 4})] * 30
    install.restore()
    assert plain(1) == (1, 2, 3)


@pytest.mark.usefixtures("flashinfer")
def test_what_cannot_be_taken_over() -> None:
    core = importlib.import_module("flashinfer.fused_moe")
    core.cutlass_fused_moe = len
    with pytest.raises(TypeError, match=r"cutlass_fused_moe: expected a Python function, got builtin"):
        engine.swap()
    del core.cutlass_fused_moe
    with pytest.raises(TypeError, match=r"cutlass_fused_moe: expected a Python function, got NoneType"):
        engine.swap()
    # Nothing is left of it: the next who starts is not told that something is installed.
    assert (install.installed(), install.taken_over()) == (False, False)
    core.cutlass_fused_moe = lambda *arguments, **named: ("the real kernel",)
    engine.swap()
    assert is_oracle(core.cutlass_fused_moe(**ARGUMENTS))


def test_nothing_is_installed_that_could_not_be_made(
    monkeypatch: pytest.MonkeyPatch, flashinfer: Path
) -> None:
    core = importlib.import_module("flashinfer.fused_moe")
    before = core.cutlass_fused_moe.__code__, dict(vars(core.cutlass_fused_moe))

    def broken() -> Any:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        install.install(broken)
    with monkeypatch.context() as patched:
        patched.setattr(install, "_relay", lambda number, free: (lambda: None).__code__)
        with pytest.raises(ValueError, match="free vars"):
            engine.shadow()
    assert (install.installed(), install.taken_over()) == (False, False)
    assert (core.cutlass_fused_moe.__code__, vars(core.cutlass_fused_moe)) == before
    monkeypatch.setenv("MXFP4REF", "swap")
    engine.start()
    assert is_oracle(core.cutlass_fused_moe(**ARGUMENTS))


@pytest.mark.usefixtures("flashinfer")
def test_a_signature_of_its_own() -> None:
    function = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
    function.__signature__ = own = inspect.Signature()
    engine.swap()
    assert function.__signature__ is own
    engine.restore()
    assert function.__signature__ is own
    del function.__signature__
    engine.swap()
    del function.__signature__  # by somebody else
    engine.restore()
    assert not install.installed()
    assert is_real(function(**ARGUMENTS))
    engine.swap()
    function.__signature__ = own
    engine.restore()
    assert function.__signature__ is own


def test_an_import_does_not_fail(flashinfer: Path, caplog: pytest.LogCaptureFixture) -> None:
    (flashinfer / "site/flashinfer/fused_moe/__init__.py").write_text("cutlass_fused_moe = len\n")
    engine.swap()
    importlib.import_module("flashinfer")
    assert "flashinfer.fused_moe: not taken over" in caplog.text
    assert not install.installed()


@pytest.mark.usefixtures("flashinfer")
def test_beneath_flashinfers_own_substitution() -> None:
    """`flashinfer.trace_apply` rebinds flashinfer's names; engines may hold what was there before."""
    holder = importlib.import_module("engine_of_names")
    fused_moe = importlib.import_module("flashinfer.fused_moe")
    original = fused_moe.cutlass_fused_moe

    def wrapper(*arguments: Any, **named: Any) -> Any:
        return original(*arguments, **named)

    wrapper._trace_apply, wrapper.__wrapped__ = True, original  # type: ignore[attr-defined]
    fused_moe.cutlass_fused_moe = wrapper
    engine.swap()
    assert is_oracle(holder.call(**ARGUMENTS))
    assert is_oracle(fused_moe.cutlass_fused_moe(**ARGUMENTS))


def test_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "MODULE", "no_such_flashinfer.fused_moe")
    with pytest.raises(ModuleNotFoundError, match="no module named 'no_such_flashinfer'"):
        engine.swap()
    monkeypatch.setenv("MXFP4REF", "swap")
    engine.start()
    assert not install.installed()


# --- the environment --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MXFP4REF", "shaddow", r"MXFP4REF: expected 'swap' or 'shadow' in the environment, got 'shaddow'"),
        ("MXFP4REF", "swap ", r"MXFP4REF: expected 'swap' or 'shadow' .* got 'swap '"),
        ("MXFP4REF_EVERY", "0", r"MXFP4REF_EVERY: expected an int from 1 to 999999999 .* got '0'"),
        ("MXFP4REF_EVERY", "all", r"MXFP4REF_EVERY: expected an int .* got 'all'"),
        ("MXFP4REF_EVERY", "-1", r"MXFP4REF_EVERY: expected an int .* got '-1'"),
        ("MXFP4REF_EVERY", "\u00b2", r"MXFP4REF_EVERY: expected an int .* got"),
        ("MXFP4REF_EVERY", "9999999999", r"MXFP4REF_EVERY: expected an int .* got '9999999999'"),
        ("MXFP4REF_EVERY", "9" * 5000, r"MXFP4REF_EVERY: expected an int .* got '9{80}'"),
        ("MXFP4REF_DUMP", __file__, r"MXFP4REF_DUMP: expected a folder in the environment, got '.*"),
    ],
)
def test_wrong_values(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4REF", "shadow")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        engine.start()


@pytest.mark.usefixtures("flashinfer")
def test_start_is_inert_without_the_variable_and_leaves_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MXFP4REF", raising=False)
    engine.start()
    assert not install.installed()
    engine.swap()
    monkeypatch.setenv("MXFP4REF", "shadow")
    engine.start()
    assert is_oracle(importlib.import_module("engine_of_names").call(**ARGUMENTS))


def test_entry_points() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        module, _, name = project["entry-points"][group]["mxfp4ref"].partition(":")
        assert getattr(importlib.import_module(module), name) is engine.start


def test_torch_compile(flashinfer: Path) -> None:
    holder = importlib.import_module("engine_of_names")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return holder.call(**{**ARGUMENTS, "input": x * 1})[0] + 0

    engine.swap()
    compiled = torch.compile(layer, backend="eager")
    bits.assert_same(compiled(SM90_CALL.input), EXPECTED)
    assert engine.counts().answered == 1
