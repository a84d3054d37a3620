from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memadvise.names import canonical_name, glob_escape, matches, repeat_pattern, shared_patterns


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
