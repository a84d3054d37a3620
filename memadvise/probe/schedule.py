"""Which steps of the probe's AdamW run count."""

from __future__ import annotations

from dataclasses import dataclass

from memadvise.probe.fidelity import WINDOW


@dataclass(frozen=True)
class Schedule:
    """Which steps count: recorded ones from the middle on, every tenth of the run, and windows that end with it.

    ``extra``: steps by which the run was made longer; recorded ones then count from the middle of all of it.
    """

    num_steps: int
    extra: int = 0

    @property
    def total(self) -> int:
        return self.num_steps + self.extra

    @property
    def recorded(self) -> range:
        return range(self.num_steps // 2, self.total, max(1, self.num_steps // 10))

    @property
    def first_counted(self) -> int:
        return self.total // 2

    @property
    def warmup(self) -> int:
        return max(1, self.num_steps // 10)

    def window(self, step: int) -> tuple[bool, bool]:
        """Whether a window of displacements begins with ``step``, and whether one ends with it."""
        place = step - self.num_steps % WINDOW
        if self.num_steps < WINDOW or place < 0:
            return False, False
        return place % WINDOW == 0, place % WINDOW == WINDOW - 1
