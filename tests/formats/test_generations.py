"""Which release has which kernel, and what a record holds."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from mxfp4ref.formats.generations import (
    BYTEWISE,
    GENERATIONS,
    NEWEST,
    PLAIN,
    WORDWISE,
    Generation,
    generation_named,
    generation_of,
)

# By the MoE mainloop's source; 0.6.15.post1, 0.6.17 and 0.7.2.post1 were also run on an H100.
OLDER = "0.6.10 0.6.12 0.6.15 0.6.15.post1 0.6.16.post3 0.6.16.post4 0.6.17"
NEWER = "0.6.16 0.6.16.post1 0.6.16.post2 0.6.18 0.6.18.post1 0.7.0 0.7.2 0.7.2.post1"


@pytest.mark.parametrize(
    ("release", "generation"),
    [
        *((r, BYTEWISE) for r in OLDER.split()),
        *((r, WORDWISE) for r in NEWER.split()),
        ("0.6.17+cu130", BYTEWISE),
    ],
)
def test_releases(release: str, generation: Generation) -> None:
    assert generation_of(release) is generation


def test_no_release_is_in_two_records() -> None:
    releases = [release for generation in (*GENERATIONS, PLAIN) for release in generation.releases]
    assert len(releases) == len(set(releases))


@pytest.mark.parametrize(
    ("release", "words"),
    [
        *((r, "weights in logical order, for which there are no goldens") for r in PLAIN.releases),
        ("0.8.0", "is in no record"),
        ("", "in no record"),
    ],
)
def test_other_releases_are_refused_with_the_way_to_add_them(release: str, words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^flashinfer {release} .*{words}.*'Adding a generation of flashinfer'"
    ):
        generation_of(release)


def test_a_release_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"^release: expected str, got NoneType"):
        generation_of(None)  # type: ignore[arg-type]


def test_names() -> None:
    assert NEWEST is WORDWISE
    for generation in (*GENERATIONS, PLAIN):
        assert generation_named(generation.name) is generation
        assert generation_named(generation.recorded_as) is generation
    with pytest.raises(ValueError, match=r"^generation: expected 'bytewise' or 'wordwise'.*, got '0.6.17'"):
        generation_named("0.6.17")


def test_copies_are_the_record_itself() -> None:
    for generation in (*GENERATIONS, PLAIN):
        assert pickle.loads(pickle.dumps(generation)) is generation
        assert copy.copy(generation) is copy.deepcopy(generation) is generation


def test_a_changed_record_does_not_become_the_one_it_was_made_of() -> None:
    changed = replace(WORDWISE, first_pair_swapped=BYTEWISE.first_pair_swapped)
    assert copy.copy(changed) is copy.deepcopy(changed) is changed
    with pytest.raises(pickle.PicklingError, match="generation: expected one of GENERATIONS"):
        pickle.dumps(changed)


def test_tiles() -> None:
    assert len(WORDWISE.tiles) == 29  # 116 tactics
    assert WORDWISE.refused <= set(WORDWISE.tiles)
    assert {k for _, _, k in BYTEWISE.tiles} == {128}
    for generation in GENERATIONS:
        assert generation.tiles[0] == (64, 16, 128)
        assert len(set(generation.tiles)) == len(generation.tiles)
