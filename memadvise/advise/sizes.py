"""Bytes of optimizer state, and of weights saved, by group and setting: exactly what the engine will allocate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memadvise.advise.candidates import Group
from memadvise.advise.rules import DENSE
from memadvise.ledger import Scan
from memadvise.optim.registry import state_bytes, weight_bytes
from memadvise.plan.schema import Setting

ENGINE_ADAMW = "memadvise adamw"  # the label of ledgers traced with our engine, one per combination of switches


class StateSizes:
    """Bytes of optimizer state by group and setting; a parameter that no gradient reaches never gets any state.

    Which those are is seen in the trace of AdamW by memadvise's engine: modules without a byte of state.
    """

    def __init__(self, scan: Scan) -> None:
        traced = next((ledger for ledger in scan.memory if ledger.optimizer == ENGINE_ADAMW), None)
        self._idle: frozenset[str] = frozenset()
        if traced is not None:
            self._idle = frozenset(
                p.name
                for p in scan.parameters
                if p.module in traced.by_module and not traced.by_module[p.module].get("optimizer_state")
            )

    def holders(self, group: Group) -> Group:
        """The group without the parameters that never hold state; it may be empty."""
        return replace(group, members=tuple(m for m in group.members if m.name not in self._idle))

    @staticmethod
    def weights_saved(group: Group, setting: Setting) -> int:
        """What ``setting`` takes off the weights themselves: something for int8 alone."""
        dtype = dtype_of(group.members[0].dtype)
        each = weight_bytes(DENSE, group.shape, dtype) - weight_bytes(setting, group.shape, dtype)
        return each * len(group.members)

    def of(self, group: Group, setting: Setting) -> int:
        members = self.holders(group).members
        return state_bytes(setting, group.shape, dtype_of(members[0].dtype)) * len(members) if members else 0


def dtype_of(name: str) -> Any:
    """``torch.float32`` for "float32"."""
    import torch

    return getattr(torch, name)
