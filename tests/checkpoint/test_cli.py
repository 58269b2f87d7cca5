"""The command `layer` with its options, each held against the function that it calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import (
    ReadOptions,
    fuse_shared,
    open_layer,
    read_name_map,
    run_layer,
)
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    GPT_OSS_H,
    NAME_MAP,
    layer_tensors,
    make_checkpoint,
    mine,
    same_bits,
    with_images,
    write_config,
)


def layer(root: Path, *options: object, number: object = 1) -> Result:
    arguments = [
        "layer",
        "--checkpoint",
        root,
        *(() if "--layer" in options else ("--layer", number)),
        "--input",
        root / "x",
        "--output",
        root / "y",
        *options,
    ]
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def make(root: Path, kind: str) -> Path:
    make_checkpoint(root, kind)
    width = GPT_OSS_H if kind.startswith("gpt") else DEEPSEEK_H
    save_file({"hidden": torch.randn(4, width).to(torch.bfloat16)}, root / "x")
    return root


def assert_written(root: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(root / "y")
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


def test_one_rank_s_part(tmp_path: Path) -> None:
    result = layer(make(tmp_path, "deepseek_v4"), "--experts", "2-3,0")
    assert result.exit_code == 0, result.output
    assert_written(
        tmp_path, run_layer(open_layer(tmp_path, 1, options=ReadOptions(experts=[2, 3, 0])), tmp_path / "x")
    )
    assert "rank_output" in result.output


@pytest.mark.parametrize(
    ("placement", "experts"), [((), [2, 3]), (("--expert-placement", "round_robin"), [1, 3])]
)
def test_a_rank_by_its_number(tmp_path: Path, placement: tuple[str, ...], experts: list[int]) -> None:
    result = layer(make(tmp_path, "deepseek_v4"), "--ep-size", "2", "--ep-rank", "1", *placement)
    assert result.exit_code == 0, result.output
    part = open_layer(tmp_path, 1, options=ReadOptions(experts=experts))
    assert_written(tmp_path, run_layer(part, tmp_path / "x"))


def test_fused_shared_expert(tmp_path: Path) -> None:
    refused = layer(make(tmp_path, "deepseek_v4"), "--fuse-shared", "stored")
    assert "name the rule by which it is to be requantised" in refused.output
    result = layer(tmp_path, "--fuse-shared", "ceil")
    assert result.exit_code == 0, result.output
    assert_written(tmp_path, run_layer(fuse_shared(open_layer(tmp_path, 1), "ceil"), tmp_path / "x"))


def test_quantised_on_request(tmp_path: Path) -> None:
    refused = layer(make(tmp_path, "gpt_oss_bfloat16"))
    assert refused.exit_code == 2
    assert "--quantize on the command line" in refused.output
    result = layer(tmp_path, "--quantize", "even")
    assert result.exit_code == 0, result.output
    assert_written(
        tmp_path, run_layer(open_layer(tmp_path, 1, options=ReadOptions(quantize="even")), tmp_path / "x")
    )


def test_own_names(tmp_path: Path) -> None:
    save_file(
        {mine(n): t for n, t in layer_tensors("weight_scale", 1).items()}, tmp_path / "model.safetensors"
    )
    write_config(tmp_path, "weight_scale")
    # The input lies elsewhere: without an index, every safetensors file of the folder counts.
    save_file({"hidden": torch.randn(4, DEEPSEEK_H).to(torch.bfloat16)}, tmp_path / "x")
    (tmp_path / "names.toml").write_text(NAME_MAP)
    result = layer(tmp_path, "--name-map", tmp_path / "names.toml")
    assert result.exit_code == 0, result.output
    options = ReadOptions(format=read_name_map(tmp_path / "names.toml"))
    assert_written(tmp_path, run_layer(open_layer(tmp_path, 1, options=options), tmp_path / "x"))


def test_the_name_map_is_not_replaced(tmp_path: Path) -> None:
    (make(tmp_path, "weight_scale") / "y").write_text(NAME_MAP)
    result = layer(tmp_path, "--name-map", tmp_path / "y")
    assert result.exit_code == 2
    assert (tmp_path / "y").read_text() == NAME_MAP
    assert "y" in result.output


def test_keys_of_config_by_hand(tmp_path: Path) -> None:
    result = layer(
        make(tmp_path, "deepseek_v4"), "--set", "norm_topk_prob=false", "--set", "scoring_func=sigmoid"
    )
    assert result.exit_code == 0, result.output
    options = ReadOptions(config={"norm_topk_prob": False, "scoring_func": "sigmoid"})
    assert_written(tmp_path, run_layer(open_layer(tmp_path, 1, options=options), tmp_path / "x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", "3-"), "expected experts as 64-95 or 0,8,16, got '3-'"),
        (("--experts", "0,3-1"), "expected experts as 64-95 or 0,8,16, got '3-1'"),
        (("--experts", "9"), "experts: expected an int from 0 to 3, got 9"),
        (("--ep-size", "2", "--ep-rank", "2"), "--ep-rank: expected one of 0 to 1 with --ep-size 2, got 2"),
        (("--ep-rank", "0", "--experts", "1"), "--ep-rank: expected none with --experts"),
        (("--diagnosis", "none"), "--diagnosis: expected --served with it"),
        (("--set", "norm_topk_prob"), "expected KEY=VALUE"),
        (("--set", "zzz=1"), "zzz: expected a key that is read, or that is in config.json"),
        (("--set", "n_group=1", "--set", "n_group=2"), "--set: expected n_group once, got it 2 times"),
        (("--ep-size", "1", "--ep-size", "2"), "--ep-size: expected once, got it more often"),
        (("--layer", "mtp.x"), r"expected a number, or mtp.0 of a draft head, got 'mtp.x'"),
        (("--layer", "mtp.3"), "layer: expected one of 0 to 2 in"),
        (("--quantize", "nearest"), "'nearest' is not one of"),
        (("--fuse-shared", "nearest"), "'nearest' is not one of"),
        # What would have no effect is not silently ignored.
        (
            ("--quantize", "floor"),
            "quantize: expected experts in bf16 to quantise, those of layers.1.ffn.* are MXFP4",
        ),
        (
            ("--router", "mixtral", "--routed-scaling-factor", "7"),
            "--routed-scaling-factor: expected none with --router mixtral",
        ),
        (("--activation", "Geglu", "--limit", "3"), "--limit: expected none with the activation Geglu"),
        (
            ("--activation", "SwigluStep", "--alpha", "3"),
            "--alpha: expected none with the activation SwigluStep",
        ),
        (("--activation", "Situ", "--beta", "3"), "--beta: expected none with the activation Situ"),
        (("--set", 'text_config={"n_group": 2}'), "text_config: expected its keys by themselves"),
        (("--set", "swiglu_limit=" + "[" * 5000), "swiglu_limit: expected a float, got str '[[["),
    ],
)
def test_wrong_options(tmp_path: Path, options: tuple[str, str], message: str) -> None:
    result = layer(make(tmp_path, "deepseek_v4"), *options)
    assert result.exit_code == 2
    assert message in result.output


def test_text_is_what_tokens_are_without_a_mask(tmp_path: Path) -> None:
    """Of a model that sees, and said so."""
    make_checkpoint(tmp_path, "deepseek_v4", with_images)
    hidden = torch.randn(4, DEEPSEEK_H).to(torch.bfloat16)
    save_file({"hidden": hidden}, tmp_path / "x")
    assert "all tokens were routed as text" in layer(tmp_path).stderr
    (tmp_path / "y").unlink()
    save_file({"hidden": hidden, "image_mask": torch.tensor([True, False, False, False])}, tmp_path / "x")
    assert layer(tmp_path).stderr == ""


def test_nothing_but_the_result_is_printed_into_a_pipe(tmp_path: Path) -> None:
    """No progress bar, on either stream."""
    result = layer(make(tmp_path, "gpt_oss"))
    assert result.stderr == ""
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        *("output", "logits", "token_selected_experts", "token_final_scales", "ambiguous", "written:")
    ]
