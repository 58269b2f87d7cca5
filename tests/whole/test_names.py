"""Names of a closed set that are misspelt are told with the one that was meant, wherever they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from mxfp4ref import Experts, MoeCall, torch_ref_cutlass_fused_moe
from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import CheckpointError, ReadOptions, read_layer, read_name_map, run_layer
from mxfp4ref.conformance import Options
from mxfp4ref.engine.replaying import ReplayOptions
from mxfp4ref.model.parallel import Ranks
from tests.helpers.checkpoints import GPT_OSS_H, make_checkpoint
from tests.helpers.layers import random_call, random_experts

LIMIT = r"got an unexpected keyword argument 'swiglu_limt'; did you mean swiglu_limit"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MoeCall(swiglu_limt=None), rf"MoeCall\(\) {LIMIT} of Experts\?"),  # type: ignore[call-arg]
        (lambda: MoeCall(tp_ranks=1), "did you mean tp_rank"),  # type: ignore[call-arg]
        (lambda: replace(random_call(0, random_experts(0)), tp_sise=1), "did you mean tp_size"),  # type: ignore[call-arg]
        (lambda: Experts(swiglu_limt=None), rf"Experts\(\) {LIMIT}"),  # type: ignore[call-arg]
        (lambda: torch_ref_cutlass_fused_moe(swiglu_limt=None), LIMIT),  # type: ignore[call-overload]
        (lambda: Options(time_out=3), "did you mean timeout"),  # type: ignore[call-arg]
        (lambda: ReplayOptions(any_tiles=True), "did you mean any_tile"),  # type: ignore[call-arg]
        (lambda: ReadOptions(quantise="ceil"), "did you mean quantize"),  # type: ignore[call-arg]
        (lambda: Ranks(epsize=2), "did you mean ep_size"),  # type: ignore[call-arg]
    ],
)
def test_keywords(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_keys_of_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    with pytest.raises(CheckpointError, match=r"norm_topk_porb: .* did you mean norm_topk_prob\?"):
        read_layer(tmp_path, 0, options=ReadOptions(config={"norm_topk_porb": True}))
    names = tmp_path / "names.toml"
    for text, message in (
        ('like = "gpt_oss"\nprefix = ["x"]', r"got 'prefix'; did you mean prefixes\?"),
        ('like = "gpt_oss"\n[names]\nrouter_wight = "r"', r"did you mean router_weight"),
        ('like = "gpt_os"', "'gpt_oss'"),
    ):
        names.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_name_map(names)
    save_file({"hiden": torch.zeros(1, GPT_OSS_H, dtype=torch.bfloat16)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"got hiden; did you mean hidden\?"):
        run_layer(read_layer(tmp_path, 0), tmp_path / "x")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"swiglu_limt": 7.0}))
    with pytest.raises(CheckpointError, match=r"swiglu_limt=7.0: .*; did you mean swiglu_limit\?"):
        read_layer(tmp_path, 0)


def test_keys_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    report.write_text(
        '{"format": "mxfp4ref-report-2", "kernal": "x", "mode": "exact", "verdict": "",'
        ' "environment": {}, "results": []}'
    )
    (other := tmp_path / "other.json").write_bytes(report.read_bytes())
    result = CliRunner().invoke(commands, ["compare", str(report), str(other)])
    assert result.exit_code == 2
    assert "expected the key 'kernel', got ['format', 'kernal'" in result.output
    assert "'kernal' is spelt nearly so" in result.output
