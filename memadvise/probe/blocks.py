"""Measure the Hessian's block structure during a probe; what cannot be measured becomes a warning, never an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memadvise.errors import MemadviseError
from memadvise.ledger import HessianValue, Parameter
from memadvise.probe import screening
from memadvise.probe.hessian import MIN_SAMPLES
from memadvise.probe.training import is_out_of_memory, private_rng


@dataclass
class BlockProbe:
    """The screen for every matrix and the confirmation for a few, on one model at several moments of its training.

    Args:
        model: its weights, gradients and modes are left alone.
        loss: batch -> scalar.
        parameters: what to measure, in order.
        batches: of the run.
        warn: takes sentences.
        report: called with (what, done, total).
        seed: of random signs and choices.
        num_samples: different gradients in the screen.
        num_probes: sign pairs in the confirmation.

    Attributes:
        values: what was measured so far, by parameter name.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor]
    parameters: Sequence[Parameter]
    batches: Sequence[Any]
    warn: Callable[[str], None]
    report: Callable[[str, int, int], None]
    seed: int = 0
    num_samples: int = 32
    num_probes: int = 8
    values: dict[str, tuple[HessianValue, ...]] = field(default_factory=dict, init=False)
    _samples: list[Any] | None = field(default=None, init=False)
    _training: bool = field(default=False, init=False)

    def screen(self, tensors: Mapping[str, Tensor]) -> None:
        """Gradient-covariance scores of every matrix; a second call is averaged with the first."""
        with self._guard("the screen of the Hessian's block structure"):
            samples = self._find_samples()
            found = screening.screen(
                self.model,
                self.loss,
                samples,
                [(p, tensors[p.name]) for p in self.parameters if p.name in tensors],
                training=self._training,
                seed=self.seed,
                progress=lambda done, total: self.report("probing: Hessian blocks", done, total),
            )
            with contextlib.closing(found):
                for name, values in found:
                    self.values[name] = screening.combine_checkpoints(self.values.get(name, ()), values)

    def _find_samples(self) -> list[Any]:
        if self._samples is None:
            self._samples, self._training, note = screening.usable_samples(
                self.model, self.loss, self.batches, self.num_samples
            )
            if note:
                self.warn(note)
            if len(self._samples) < MIN_SAMPLES:
                self.warn(
                    f"the batches hold only {len(self._samples)} separable samples; "
                    f"the screen of the Hessian's block structure needs {MIN_SAMPLES}"
                )
        return self._samples

    def confirm(self, tensors: Mapping[str, Tensor]) -> None:
        """Hessian-vector products for one matrix of each role."""
        chosen = screening.to_confirm([p for p in self.parameters if p.name in tensors])
        for done, parameter in enumerate(chosen):
            self.report("probing: Hessian-vector products", done, len(chosen))
            with self._guard(f"Hessian-vector products for {parameter.name}"):
                values = screening.confirm(
                    self.model,
                    self.loss,
                    screening.confirmation_batch(self.batches[0]),
                    parameter,
                    tensors[parameter.name],
                    training=self._training,
                    num_probes=self.num_probes,
                    seed=self.seed,
                )
                self.values[parameter.name] = (*self.values.get(parameter.name, ()), *values)
        if chosen:
            self.report("probing: Hessian-vector products", len(chosen), len(chosen))

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Measuring draws no random number from the run, and no failure of it ends the probe."""
        problem = None
        with private_rng(self.seed):
            try:
                yield
            except MemadviseError as error:
                problem = "out of memory" if is_out_of_memory(error) else error.message
            except MemoryError:
                problem = "out of memory"
            except RuntimeError as error:  # an operation without a double backward pass, or the device's memory
                problem = "out of memory" if is_out_of_memory(error) else str(error).strip().splitlines()[0]
        if problem is not None:
            self.warn(f"{what}: not measured ({problem})")
