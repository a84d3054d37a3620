"""Entries of a baseline made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from memadvise.baseline import Bytes, Entry, Observation

MIB = 2**20
MODULES: Bytes = {
    "tokens": {"weights": {"float32": 4 * MIB}, "optimizer_state": {"float32": 8 * MIB}},
    **{
        f"h.{i}.mlp": {
            "weights": {"float32": MIB},
            "optimizer_state": {"float32": 2 * MIB},
            "activations": {"gelu float32": 3 * MIB, "addmm float32": 3 * MIB},
        }
        for i in range(4)
    },
    "(loss)": {"temporaries": {"_log_softmax float32": 2 * MIB}},
}
HOSTILE = (
    'a"b|c<img src=x onerror=alert(1)>`&::error::\n::set-output name=x::y ##[error]z \x1b[31m \U0001f600 @all \u202e'
)


def make_entry(by_module: Bytes | None = None, **changes: Any) -> Entry:
    """An entry whose sums are right."""
    by_module = MODULES if by_module is None else by_module
    totals: Counter[str] = Counter()
    for categories in by_module.values():
        for category, makers in categories.items():
            totals[category] += sum(makers.values())
    peak = totals.total()
    entry = Entry(
        target="model.py",
        plan=None,
        batch=("int64[8, 64]",),
        source="estimate",
        environment={"device": "cuda sm_90", "estimator": "1", "torch": "2.13.0"},
        information={"dtype": "float32", "optimizer": "torch.optim.AdamW (foreach)", "target_sha256": "0" * 64},
        peak_bytes=peak,
        peak_phase="backward",
        state_bytes=16 * MIB,
        by_phase={"forward": peak - MIB, "backward": peak, "step": peak - 2 * MIB},
        by_category=dict(totals),
        by_module=by_module,
    )
    return replace(entry, **changes)


def observation(entry: Entry, places: dict[tuple[str, str, str], str] | None = None) -> Observation:
    return Observation(entry, places or {})


def edited(module: str, category: str, makers: dict[str, int], base: Bytes = MODULES) -> Bytes:
    """The modules with one cell replaced."""
    return {**base, module: {**base.get(module, {}), category: makers}}
