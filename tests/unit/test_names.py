from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.names import (
    canonical_name,
    expand_ranges,
    fold_ranges,
    glob_escape,
    matches,
    repeat_pattern,
    shared_patterns,
)


@pytest.mark.parametrize(
    "wrapped",
    [
        "h.0.attn.weight",
        "module.h.0.attn.weight",
        "_orig_mod.h.0.attn.weight",
        "module._orig_mod.h.0.attn.weight",
        "_fsdp_wrapped_module.h.0._fsdp_wrapped_module.attn.weight",
        "h.0._checkpoint_wrapped_module.attn.weight",
        "_orig_mod.module.h.0.attn.weight",
    ],
)
def test_every_wrapper_maps_to_the_raw_name(wrapped: str) -> None:
    assert canonical_name(wrapped) == "h.0.attn.weight"


def test_a_submodule_called_module_keeps_its_name() -> None:
    assert canonical_name("encoder.module.weight") == "encoder.module.weight"
    assert canonical_name("module") == "module"


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("h.*.attn.weight", "h.3.attn.weight", True),
        ("h.*.attn.weight", "h.3.x.attn.weight", False),
        ("**.weight", "h.3.attn.weight", True),
        ("**", "anything.at.all", True),
        ("h.?.w", "h.3.w", True),
        ("h.?.w", "h.13.w", False),
        ("h.[01].w", "h.1.w", True),
        ("h.[!01].w", "h.1.w", False),
        ("re:h\\.\\d+\\.w", "h.12.w", True),
        ("re:h", "h.12.w", False),
        ("w", "ww", False),
        ("h.+.w", "h.1.w", False),
    ],
)
def test_globs(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) is hit


ODD_NAMES = st.text(alphabet="ab.*?[]!-_0123", min_size=1, max_size=20)


@given(ODD_NAMES, ODD_NAMES)
def test_an_escaped_name_matches_itself_and_nothing_else(name: str, other: str) -> None:
    assert matches(glob_escape(name), name)
    assert matches(glob_escape(name), other) == (name == other)


def test_repeat_pattern() -> None:
    assert repeat_pattern("h.3.mlp.2.w") == ("h.*.mlp.*.w", (3, 2))
    assert repeat_pattern("conv1.w") == ("conv1.w", ())
    squared = "by_power.\u00b2.w"  # a digit to str.isdigit(), no number to int()
    assert repeat_pattern(squared) == (squared, ())


def test_shared_patterns_keep_the_numbers_that_do_not_vary() -> None:
    names = ["h.0.mlp.2.w", "h.1.mlp.2.w", "h.0.mlp.0.w", "norm.w", "e[0].w"]
    assert shared_patterns(names) == {
        "h.*.mlp.*.w": ["h.0.mlp.2.w", "h.1.mlp.2.w", "h.0.mlp.0.w"],
        "norm.w": ["norm.w"],
        "e[[]0].w": ["e[0].w"],
    }
    assert list(shared_patterns(names[:2])) == ["h.*.mlp.2.w"]
    assert list(shared_patterns(["h.3.w"])) == ["h.3.w"]


def test_ranges_read_like_a_shells() -> None:
    names = ["h.0.w", "h.1.w", "h.2.w", "h.5.w", "head"]
    assert fold_ranges(names) == ["h.{0..2,5}.w", "head"]
    assert fold_ranges(f"s.{i}.b.{j}.x" for i in range(2) for j in (0, 2)) == ["s.{0..1}.b.{0,2}.x"]
    assert expand_ranges("s.{0..1}.b.{0,2}.x") == ["s.0.b.0.x", "s.0.b.2.x", "s.1.b.0.x", "s.1.b.2.x"]


SEGMENTS = st.sampled_from(
    ["0", "1", "2", "10", "01", "h", "{0..3}", "{1}", "{2", "..", "\\", "\\{1}", "a|b", "", "\u0663"]
)


@given(st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join), max_size=12))
def test_ranges_give_back_the_names(names: list[str]) -> None:
    words = fold_ranges(names)
    assert sorted(name for word in words for name in expand_ranges(word)) == sorted(set(names))


@pytest.mark.parametrize("word", ["{0..99999999}", "{5..1}", "{0..999}.{0..999}.{0..999}", "{" + "9" * 60 + "}"])
def test_ranges_that_would_fill_the_memory_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"range|stands for"):
        expand_ranges(word)
