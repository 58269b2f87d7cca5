"""The documentation: every Python example runs, every link between pages leads somewhere, every command exists."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from click.testing import CliRunner

import mxfp4ref
from mxfp4ref.__main__ import commands
from mxfp4ref.goldens import open_goldens, tensor_bytes
from tests.test_rooms import FLOORS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "goldens" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh|cpp|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if _blocks(p, "python")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_examples_run(builtin_root: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who has installed the package has no other goldens.
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(builtin_root))
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {"__name__": "example"}
    for number, code in enumerate(_blocks(page, "python")):
        exec(compile(code, f"{page.name}, example {number}", "exec"), namespace)


@pytest.mark.usefixtures("patient")
def test_tutorial_shows_what_its_cells_print(builtin_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what one output does not tell from a named mistake, which takes a whole search."""
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(builtin_root))
    tool = runpy.run_path(str(ROOT / "tools" / "tables" / "notebook.py"))
    written = tool["read"]()
    cells = zip(tool["executed"](written)["cells"], written["cells"], strict=True)
    assert [got["source"][0] for got, wanted in cells if got != wanted] == [
        "from mxfp4ref import torch_ref_cutlass_fused_moe\n"
    ]


@pytest.mark.slow
def test_tutorial_shows_all_that_its_cells_print(builtin_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(builtin_root))
    tool = runpy.run_path(str(ROOT / "tools" / "tables" / "notebook.py"))
    written = tool["read"]()
    assert tool["executed"](written) == written


def test_goldens_are_read_with_numpy_alone() -> None:
    _, code = _blocks(ROOT / "goldens" / "README.md", "python")
    without = "import sys; sys.modules.update(dict.fromkeys(('torch', 'mxfp4ref', 'ml_dtypes')))\n"
    done = subprocess.run(
        [sys.executable, "-c", without + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[2, 5]: got ")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_goldens_are_read_in_cpp(tmp_path: Path) -> None:
    (code,) = _blocks(ROOT / "goldens" / "README.md", "cpp")
    main = """
#include <cstdio>
int main(int, char** arguments) {
  for (unsigned char byte : read_tensor(arguments[1], arguments[2])) std::printf("%02x", byte);
}
"""
    (tmp_path / "read.cpp").write_text(code + main)
    subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Werror", "-o", "read", "read.cpp"], cwd=tmp_path, check=True
    )
    for name in ("token_selected_experts", "input"):
        case = ROOT / "goldens" / "gemm" / "wide_exponents.safetensors"
        done = subprocess.run([tmp_path / "read", case, name], capture_output=True, text=True, check=True)
        assert bytes.fromhex(done.stdout) == tensor_bytes(safetensors.torch.load_file(case)[name])


def test_readme_does_what_it_says(
    builtin_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first commands, from the nameless kernel on, and what it quotes of the output."""
    page = ROOT / "README.md"
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(builtin_root))
    monkeypatch.chdir(tmp_path)
    for name, code in zip(("kernel.py", "layer.py"), _blocks(page, "python"), strict=True):
        Path(name).write_text(code, encoding="utf-8")
    lines = [shlex.split(line, comments=True)[1:] for line in _blocks(page, "sh")[0].splitlines()]
    assert lines[3] == ["conform", "kernel.py:fused_moe", "-x"]
    lines[3] += ["--no-isolate", "--goldens", str(ROOT / "goldens")]
    said = [CliRunner().invoke(commands, line, env={"COLUMNS": "400"}) for line in lines[3:]]
    assert [result.exit_code for result in said] == [1, 0, 0]
    left = {
        path.name + "/" * path.is_dir()
        for path in (*Path().iterdir(), Path("adapter.py"), Path("report.html"))
    }
    assert left <= {line.strip("\n").removeprefix("/") for line in (ROOT / ".gitignore").read_text().split()}
    (quoted,) = _blocks(page, "text")
    added = f" --no-isolate --goldens {ROOT / 'goldens'}"
    assert said[0].output.replace(added, "").endswith(f"\n{quoted.strip()}\n")
    assert "1 recorded call of 1 layer: 1 equal." in said[2].output
    (within,) = re.findall(
        r"limit forgotten: .* (\d+%) are within", (ROOT / "docs" / "tutorial.ipynb").read_text()
    )
    assert f"{within} of the elements" in " ".join(page.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "tutorial.ipynb"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def _commands(page: Path) -> list[str]:
    """Every command line that a page has: in its shell blocks, in indented lines and in code within text."""
    text = page.read_text(encoding="utf-8")
    lines = "".join(_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    ((?:mxfp4ref|python|make|pytest) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:mxfp4ref [a-z]|python tools/|make )[^`\n]*)`", text)
    return [part.strip() for line in lines for part in line.split(" && ")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_commands_exist(builtin_root: Path, page: Path) -> None:
    """Commands and their options are parsed; files, make's targets and pytest's options are there."""
    for line in _commands(page):
        words = [
            word for word in shlex.split(line.removeprefix("python -m "), comments=True) if word != "..."
        ]
        match words:
            case ["mxfp4ref", "--version" | "--help"]:
                pass
            case ["mxfp4ref", name, *arguments]:
                with commands.make_context("mxfp4ref", [name]) as context:
                    command = commands.get_command(context, name)
                    assert command is not None, line
                    command.make_parser(context).parse_args(arguments)  # raises for an option that is none
                assert name != "show" or arguments[0] in open_goldens(builtin_root).names()
            case ["python", path, *arguments] if path.endswith(".py"):
                text = (ROOT / path).read_text(encoding="utf-8")
                for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
                    assert flag in text or flag.removeprefix("--").replace("-", "_") in text, line
            case ["make", *targets]:
                for target in (target for target in targets if "=" not in target):
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            case ["pytest", *options]:
                plugin = (ROOT / "mxfp4ref" / "conformance" / "pytest_plugin.py").read_text(encoding="utf-8")
                for word in options:
                    name = word.split("=")[0]
                    assert (
                        f'"{name}"' in plugin
                        or (ROOT / word).exists()
                        or word in ("-m", "flashinfer_checkout", "--lf", "-x", "mxfp4")
                        or word.removeprefix("mxfp4::") in open_goldens().names()
                    ), line


def test_api_page_has_all_rooms_and_names() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    front, *rooms = re.split(r"^## ", text, flags=re.MULTILINE)
    offered = {name: module for module, name in re.findall(r"`~(mxfp4ref[\w.]*)\.(\w+)`", front)}
    assert {*offered, "__version__"} == set(mxfp4ref.__all__)
    for name, module in offered.items():
        assert getattr(importlib.import_module(module), name) is getattr(mxfp4ref, name)
    assert [room.split()[0] for room in rooms] == [room for floor in FLOORS for room in floor]
    for room in rooms:
        modules = re.findall(r"automodule:: (mxfp4ref[\w.]*)", room)
        assert modules
        assert {module.split(".")[1] for module in modules} == {room.split()[0]}
        assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_use_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for command, arguments in re.findall(r"(?<=[ /])(mxfp4ref [a-z]+|python tools/[\w/]+\.py)\b(.*)", text):
        if command.startswith("mxfp4ref"):
            shown = (
                CliRunner().invoke(commands, [command.split()[1], "--help"], env={"COLUMNS": "200"}).output
            )
        else:
            program = [sys.executable, ROOT / command.split()[1], "--help"]
            shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert flag in shown, f"{command} {flag}"


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "mxfp4ref").rglob("*.py")) if ">>>" in p.read_text(encoding="utf-8")],
    ids=lambda p: p.stem,
)
def test_doctests(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
