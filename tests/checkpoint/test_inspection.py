"""What is in a checkpoint: every layer, what would be refused and why, and unusual weights counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import CheckpointError, inspection, read_layer
from mxfp4ref.checkpoint.inspection import Counts, Inspection, LayerEntry, inspect
from mxfp4ref.conformance.cli.checkpoint_table import _unusual, show
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import pack_codes
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    DEEPSEEK_I,
    EXPERTS,
    PER_EXPERT,
    Tensors,
    make_checkpoint,
    write_config,
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments], env={"COLUMNS": "200"})


KINDS = ("deepseek_v4", "gpt_oss", "gpt_oss_original", *PER_EXPERT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_listed(tmp_path: Path, kind: str) -> None:
    make_checkpoint(tmp_path, kind)
    refused = {entry.refused for entry in inspect(tmp_path, weights=False).layers}
    assert refused == {""}
    found = inspect(tmp_path, weights=False)
    assert [entry.layer for entry in found.layers] == [0, 1, 2]
    assert {(entry.format, entry.experts) for entry in found.layers} == {(kind, EXPERTS)}
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    total = sum(entry.bytes for entry in found.layers)
    assert 0 < size - total < 80_000  # the headers
    assert all(entry.router and not entry.refused for entry in found.layers)


def test_the_table(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    result = invoke("checkpoint", tmp_path)
    assert result.exit_code == 0, result.output
    assert "3 layers with experts of" in result.output
    assert re.search(
        r"0 +deepseek_v4 +4 +256 x 128 +sqrt_softplus, 2 of 4, table, normalised by sum", result.output
    )
    assert re.search(
        r"[12] +deepseek_v4 +4 +256 x 128 +sqrt_softplus, 2 of 4, bias, .*factor 1\.5", result.output
    )
    assert "of codes at +-6" not in result.output  # of random codes they are an eighth
    assert f"every layer can be run: mxfp4ref layer --checkpoint {tmp_path} --layer 0 --input" in " ".join(
        result.output.split()
    )
    quick = invoke("checkpoint", tmp_path, "--names-only")
    assert "1 to 2" in quick.output
    assert "not read" in quick.output
    only = invoke("checkpoint", tmp_path, "--layer", 2, "--json")
    assert [entry["layer"] for entry in json.loads(only.output)["layers"]] == [2]


def test_what_would_be_refused_and_why(tmp_path: Path) -> None:
    """One layer's fault is no other's, and all of them are told at once."""
    make_checkpoint(tmp_path, "deepseek_v4", lambda t: t.pop("layers.1.ffn.experts.2.w3.scale"))
    result = invoke("checkpoint", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"refused: layer 1: layers\.1\.ffn\.experts\.2\.w3\.scale: expected", result.output)
    assert "refused: layer 0" not in result.output
    write_config(tmp_path, "deepseek_v4", router_shift=1.0, routed_scaling_factor=None)
    result = invoke("checkpoint", tmp_path, "--names-only")
    assert "refused: layer 0 to 2: config.json: router_shift=1.0: expected keys" in result.output
    result = invoke("checkpoint", tmp_path, "--names-only", "--set", "router_shift=null")
    assert re.search(
        "refused: layer .*expected routed_scaling_factor, .*--routed-scaling-factor", result.output
    )
    given = invoke(
        *(
            "checkpoint",
            tmp_path,
            "--layer",
            0,
            "--set",
            "router_shift=null",
            "--set",
            "routed_scaling_factor=1.5",
        )
    )
    assert given.exit_code == 0, given.output


@pytest.mark.parametrize(
    ("place", "layers", "layer"),
    [
        ("layers.1", [0, 1, 2], 1),
        ("model.layers.7", [0, 2, 7], 7),
        ("tower.layers.0", [0, 2, "tower.layers.0"], None),
        ("model.mtp.0", [0, 2, "mtp.0"], "mtp.0"),
    ],
)
def test_layers_in_no_known_naming_are_refused(
    tmp_path: Path, place: str, layers: list[int | str], layer: int | str | None
) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            renamed = name.replace(".w", ".u").replace("layers.1", place)
            tensors[renamed] = tensors.pop(name).clone()

    make_checkpoint(tmp_path, "deepseek_v4", rename)
    result = invoke("checkpoint", tmp_path, "--names-only", "--json")
    assert result.exit_code == 1
    entries = json.loads(result.output)["layers"]
    assert [entry["layer"] for entry in entries] == layers
    unknown = "found ffn.experts.0.u1.scale and 23 other tensors; a name map may say what they are"
    assert [entry["refused"].endswith(unknown) for entry in entries] == [
        one in (layer, place) for one in layers
    ]
    report = invoke("checkpoint-report", tmp_path)
    assert (report.exit_code, unknown in report.stderr) == (2, True)
    if layer is not None:
        with pytest.raises(CheckpointError, match=f"^layer {layer!r}: expected experts in the naming of "):
            read_layer(tmp_path, layer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("num_experts_per_tok=7", "top_k: expected an int from 1 to 4, got 7"),
        ("n_group=3", "n_group: expected a divisor"),
    ],
)
def test_a_router_that_would_be_refused(tmp_path: Path, change: str, words: str) -> None:
    """Whatever `layer` says of every input, this says too."""
    make_checkpoint(tmp_path, "deepseek_v4")
    result = invoke("checkpoint", tmp_path, "--layer", 1, "--names-only", "--set", change)
    assert result.exit_code == 1
    assert words in result.output


def test_a_checkpoint_without_experts(tmp_path: Path) -> None:
    result = invoke("checkpoint", tmp_path)
    assert result.exit_code == 2
    assert "expected model.safetensors.index.json or a *.safetensors or *.gguf file" in result.output
    make_checkpoint(tmp_path, "gpt_oss")
    assert "layer: expected one of 0 to 2" in invoke("checkpoint", tmp_path, "--layer", 3).output
    assert invoke("checkpoint", tmp_path, "--layer", "mtp").exit_code == 2


def test_counts() -> None:
    codes = torch.ones(1, 64, 32, dtype=torch.uint8)
    codes[0, 0] = 0
    codes[0, 1] = 8  # -0 is empty, too
    codes[0, 2, :3] = torch.tensor([7, 15, 6])
    scales = torch.full((1, 64, 1), 127, dtype=torch.uint8)
    scales[0, 0], scales[0, 3], scales[0, 4] = 0, 0, 255
    down = torch.full((1, 32, 32), 7, dtype=torch.uint8)
    counts = Counts()
    counts.add(
        Experts(pack_codes(codes), scales, pack_codes(down), torch.full((1, 32, 1), 127, dtype=torch.uint8))
    )
    assert counts == Counts(
        groups=96,
        codes=96 * 32,
        zero_scales=1,
        nan_scales=1,
        empty_groups=2,
        saturated_codes=2 + 32 * 32,
        not_powers=0,
    )


@pytest.mark.parametrize("at_once", [1, 1 << 27])
def test_unusual_weights_and_scales_are_counted(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if re.search(r"ffn\.experts\..*scale", n)]:
            tensors[name] = torch.ones(tensors[name].shape)
        tensors["layers.1.ffn.experts.2.w1.scale"][3, 1] = 0.3
        tensors["layers.1.ffn.experts.3.w2.scale"][:2] = 3.0

    monkeypatch.setattr(inspection, "_BYTES_AT_ONCE", at_once)
    make_checkpoint(tmp_path, "deepseek_v4", change)
    steps: list[Any] = []
    one = inspect(tmp_path, layers=[1], step=lambda *a: steps.append(a)).layers[0]
    assert "are not: [3, 1] = 0.3" in one.refused
    assert one.counts is not None
    assert one.counts.not_powers == 1 + 2 * DEEPSEEK_I // 32
    assert len(steps) == (EXPERTS if at_once == 1 else 1)
    zeros, groups = (
        inspect(tmp_path, layers=[2]).layers[0].counts,
        3 * EXPERTS * DEEPSEEK_H * DEEPSEEK_I // 32,
    )
    assert zeros is not None
    assert (zeros.groups, zeros.zero_scales, zeros.nan_scales) == (groups, 0, 0)


def test_many_codes_at_the_end_are_unusual() -> None:
    assert _unusual(Counts(codes=1000, saturated_codes=130)) == ""
    assert _unusual(Counts(codes=1000, saturated_codes=160)) == "16.0 % of codes at +-6"


def test_many_reasons_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    """An index may name as many layers as it likes."""
    layers = [LayerEntry(n, "gpt_oss", f"{n}.", refused=f"{n}.x: expected it") for n in range(1000)]
    show(Inspection(Path("c"), "", 1, 1, layers))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused")]
    assert told[19:] == [
        "refused: layer 19: 19.x: expected it",
        "refused, too: layer 20 to 999; --json has each reason",
    ]
