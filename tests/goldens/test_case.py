"""What is stored: every golden case is sound, is what its definition gives, and gives back a call."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from mxfp4ref.goldens import (
    Case,
    GoldenError,
    derive,
    generator,
    open_goldens,
    run_stage,
    store,
    tensor_bytes,
    writing,
)
from mxfp4ref.goldens.cases import DEFINITIONS, SUITES
from mxfp4ref.goldens.manifest import BUILTIN
from mxfp4ref.goldens.runs import runs
from mxfp4ref.goldens.store import KINDS
from mxfp4ref.sm90.tactics import Sm90Kernel

CHECKOUT = Path(__file__).resolve().parents[2] / "goldens"
MOE = "gemm/wide_exponents"
SMALL = "layout/fold_scales_0_6_16"


# Every golden case, in the checkout and in the package.


@pytest.mark.parametrize("which", ["checkout", "builtin"])
def test_everything_stored_is_sound(builtin_root: Path, which: str) -> None:
    assert open_goldens(CHECKOUT if which == "checkout" else builtin_root).verify() == []


def test_checkout_holds_all_definitions_and_the_package_its_share(builtin_root: Path) -> None:
    assert open_goldens(CHECKOUT).names() == sorted(DEFINITIONS)
    assert open_goldens(builtin_root).names() == sorted(BUILTIN)
    for path in builtin_root.glob("*/*"):
        assert path.read_bytes() == (CHECKOUT / path.relative_to(builtin_root)).read_bytes()


def test_sizes(builtin_root: Path) -> None:
    assert sum(path.stat().st_size for path in CHECKOUT.rglob("*") if path.is_file()) < 32 << 20
    assert sum(path.stat().st_size for path in builtin_root.rglob("*") if path.is_file()) < 1_500_000


def test_every_key_is_explained() -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    words = set()
    for name in open_goldens(CHECKOUT).names():
        sidecar = json.loads((CHECKOUT / f"{name}.json").read_bytes())
        words |= {*sidecar, *sidecar["parameters"], sidecar["kind"], sidecar["suite"]}
        words |= {key for recipe in sidecar["derived"].values() for key in recipe}
        words |= {tensor for tensor in sidecar["tensors"] if ".tile_k_" not in tensor}
    assert {word for word in words if f"`{word}`" not in readme} == set()


# What can be understood only beside another case.
LEANS = re.compile(
    r"^(the same|this|these|that|it|both at once|as above|also|again|likewise|similarly|another) *\b"
    r"|\b(see `|as above|as before|the (previous|preceding|last|other) case|mirrored_)",
    re.IGNORECASE,
)


def test_every_text_stands_alone() -> None:
    for text in (
        "The same for GEMM2.",
        "GEMM2's output. I = 384: see `mirrored_hidden_384`.",
        "Both at once: ranks.",
    ):
        assert LEANS.search(text)
    texts = [definition.why for definition in DEFINITIONS.values()]
    assert [text for text in texts if LEANS.search(text)] == []
    assert sorted(text for text in set(texts) if texts.count(text) > 1) == []


def test_names_say_why() -> None:
    for definition in DEFINITIONS.values():
        assert len(definition.why) > 20, definition.id
        assert definition.kind in KINDS
    assert {definition.suite for definition in DEFINITIONS.values()} == {
        (module.__doc__ or "").split("`")[1] for module in SUITES
    }


SEARCHED = [
    name for name in sorted(DEFINITIONS) if name.startswith(("activation/", "step_and_situ/"))
]  # 1 s each
FAST = [n for n in sorted(DEFINITIONS) if not n.startswith("models/") and n not in SEARCHED][::6] + SEARCHED[
    ::15
]


@pytest.mark.parametrize("name", FAST)
def test_definitions_give_the_stored_bytes(name: str) -> None:
    for kind, data in writing.build_case(name).items():
        assert data == (CHECKOUT / f"{name}.{kind}").read_bytes()


@pytest.mark.parametrize("part", range(4))
def test_the_model_gives_the_stored_outputs(part: int) -> None:
    """Those of the package are the same bytes."""
    goldens = open_goldens(CHECKOUT)
    for case in map(
        goldens.load, [name for name in goldens.names() if not name.startswith("models/")][part::4]
    ):
        for run in runs(case):
            output = run_stage(case.kind, run.inputs)
            got = dict.fromkeys(run.expected, output) if torch.is_tensor(output) else output
            for key, expected in run.expected.items():
                assert tensor_bytes(got[key]) == tensor_bytes(expected), (case.id, key)


# Cases.


def test_case_has_what_the_sidecar_says() -> None:
    case = open_goldens(CHECKOUT).load("gemm/mirrored_both_512")
    assert (case.id, case.kind) == ("gemm/mirrored_both_512", "moe")
    assert sorted(case.outputs) == [(a, b) for a in (128, 256, 512) for b in (128, 256, 512)]
    # With K = 512 only tile_k 128 has a tile in the middle.
    assert tensor_bytes(case.outputs[256, 512]) == tensor_bytes(case.outputs[512, 256])
    assert tensor_bytes(case.outputs[128, 256]) != tensor_bytes(case.outputs[256, 256])
    hashes = case.output_hashes
    assert hashes[256, 512] == hashlib.sha256(tensor_bytes(case.outputs[256, 512])).hexdigest()
    call = case.call(Sm90Kernel.of_tiles((256, 128)))
    assert call.kernel.tile_k == (256, 128)
    assert call.experts.fc1_weights.equal(case.tensors["fc1_weights"])


def test_call_of_another_kind(builtin_root: Path) -> None:
    with pytest.raises(ValueError, match=r"layout/fold_scales_0_6_16.*expected.*'moe', got.*'layout'"):
        open_goldens(builtin_root).load(SMALL).call()


def test_tile_k_that_does_not_divide(builtin_root: Path) -> None:
    with pytest.raises(ValueError, match="kernel: expected a K tile"):
        open_goldens(builtin_root).load(MOE).call(Sm90Kernel.of_tiles((512, 128)))


def test_parallel_case_keeps_its_rank(builtin_root: Path) -> None:
    call = open_goldens(builtin_root).load("parallel/sentinels_on_rank_3_of_4").call()
    assert (call.ep_size, call.ep_rank, call.tp_size, call.tp_rank, call.strict) == (4, 3, 1, 0, True)
    assert call.experts.num_experts == 2


def test_case_of_a_caller_that_errs_is_not_strict() -> None:
    case = open_goldens(CHECKOUT).load("parallel/ids_of_no_rank")
    assert not case.call().strict
    assert case.outputs[128, 128].shape == case.tensors["input"].shape


def test_names_and_suites(builtin_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BUILTIN_ROOT", builtin_root)
    goldens = open_goldens(builtin_root)
    assert goldens.suites == sorted({name.split("/")[0] for name in BUILTIN})
    assert goldens.names("gemm") == ["gemm/underflow_in_gemm1", MOE]
    with pytest.raises(GoldenError, match=r"suite: expected one of .*gemm.*, got 'gem'"):
        goldens.names("gem")
    with pytest.raises(GoldenError, match=f"no such case.*did you mean {MOE}.*to get all"):
        goldens.load("gemm/wide_exponent")
    with pytest.raises(GoldenError, match=r"goldens; did you mean gemm/ordinary\?$"):
        open_goldens(CHECKOUT).load("gemm/nothing")


# Derived tensors.


def test_derived_blocks_padding_and_offset() -> None:
    recipe = {
        "seed": 9,
        "rule": "bytes",
        "shape": [4, 8, 5],
        "content": [2, 3, 4],
        "first_expert": 10,
        "experts": [1, 3],
    }
    tensor, digest = derive("w", recipe)
    stream = generator.random_bytes(9, "w", 0, 14 * 24)
    for expert in range(4):
        for block in range(2):
            for row in range(4):
                for column in range(5):
                    inside = expert in (1, 3) and row < 3 and column < 4
                    index = ((10 + expert) * 2 + block) * 12 + row * 4 + column
                    expected = int(stream[index]) if inside else 0
                    assert int(tensor[expert, 4 * block + row, column]) == expected
    assert digest == hashlib.sha256(tensor_bytes(tensor[[1, 3]])).hexdigest()


def test_model_case_derives_only_what_it_uses() -> None:
    case = open_goldens(CHECKOUT).load("models/deepseek_v4_flash")
    small = {name: recipe for name, recipe in case.derived.items() if name == "fc2_scales"}
    recipe = small["fc2_scales"]
    assert recipe["shape"] == [256, 4096, 64]
    tensor, digest = derive("fc2_scales", recipe)
    assert digest == recipe["sha256"]
    used = tensor.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
    assert used == recipe["experts"]
    assert set(case.tensors["token_selected_experts"].flatten().tolist()) == set(used)


def test_derived_tensor_with_another_hash() -> None:
    case = open_goldens(CHECKOUT).load("models/gpt_oss_20b")
    wrong = {"fc2_scales": {**case.derived["fc2_scales"], "seed": 1}}
    forged = Case(**{**vars(case), "derived": wrong})
    with pytest.raises(GoldenError, match=r"models/gpt_oss_20b: derived tensor fc2_scales: expected SHA-256"):
        forged.call()
