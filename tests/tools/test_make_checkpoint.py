"""The generator of checkpoints, and the page that starts from it."""

from __future__ import annotations

import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import FORMATS, open_layer, run_layer
from mxfp4ref.checkpoint.inspection import inspect

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
TOOL = ROOT / "tools" / "make_checkpoint.py"
MADE = (
    *("deepseek_v4", "deepseek_v4_quark", "weight_scale", "compressed_tensors", "block_sparse_moe"),
    *("gpt_oss", "gpt_oss_original"),
)


def make(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_page_from_the_start_to_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of its first block but pip's, in a new folder."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    assert lines[0][:2] == ["pip", "install"]
    outputs = ""
    for words in lines[1:]:
        if words[0] == "python":
            assert words[1] == "tools/make_checkpoint.py"
            make(monkeypatch, *words[2:])
        else:
            result = CliRunner().invoke(commands, words[1:])
            assert result.exit_code == 0, result.output
            outputs += result.output
    assert "every layer can be run" in outputs
    output = load_file("out.safetensors")["routed_output"]
    assert (list(output.shape), output.isfinite().all()) == ([5, 256], True)


def test_a_folder_that_exists_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make(monkeypatch, str(tmp_path))
    assert ended.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"folder: expected a new one, got {tmp_path}: File exists")
    )


def test_the_page_lists_every_format() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| `", PAGE, re.MULTILINE))
    assert [*rows] == [*FORMATS]
    assert all(text.startswith(FORMATS[name].stores) for name, text in rows.items())


@pytest.mark.parametrize("name", ["gpt_oss", "weight_scale"])
def test_sizes_that_are_no_multiples_of_128(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As gpt-oss's own 2880; DeepSeek-V4's shared expert has a scale for each 128 x 128."""
    sizes = ("--hidden", "96", "--inner", "160", "--layers", "1")
    make(monkeypatch, str(tmp_path / "model"), "--format", name, *sizes)
    result = run_layer(open_layer(tmp_path / "model", 0), tmp_path / "model" / "input.safetensors")
    assert next(iter(result.values())).shape == (5, 96)
    with pytest.raises(SystemExit):
        make(monkeypatch, str(tmp_path / "other"), *sizes)
    assert "multiples of 128 in deepseek_v4, got 96 and 160" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", [128, 2048])
@pytest.mark.parametrize("name", [name for name in MADE if FORMATS[name].needs_limit])
def test_a_wrong_limit_is_seen(
    tmp_path: Path, name: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every token, whatever the width."""
    folder = tmp_path / "model"
    sizes = ("--hidden", str(hidden), "--experts", "3", "--layers", "1", "--shards", "1")
    make(monkeypatch, str(folder), "--format", name, *sizes)
    layers = [open_layer(folder, 0, limit=limit) for limit in (None, math.inf)]
    right, wrong = (next(iter(run_layer(layer, folder / "input.safetensors").values())) for layer in layers)
    assert right.isfinite().all()
    assert (right != wrong).any(1).all()


@pytest.mark.parametrize("name", MADE)
def test_every_layer_of_what_it_makes_runs(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    make(monkeypatch, str(folder), "--format", name, "--images", "--shards", "3", "--experts", "5")
    found = inspect(folder)
    assert [(entry.format, entry.refused) for entry in found.layers] == [(name, "")] * 2
    for layer in "01":
        arguments = [
            "layer",
            "--checkpoint",
            folder,
            "--layer",
            layer,
            "--input",
            folder / "input.safetensors",
        ]
        result = CliRunner().invoke(commands, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
