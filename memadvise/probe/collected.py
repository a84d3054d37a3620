"""What the probe knows of every parameter so far, and the record made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from memadvise.advise.rules import DENSE
from memadvise.ledger import FidelityValue, HessianValue, OptimizerRun, Parameter, ParameterProbe, ProbeLedger
from memadvise.names import canonical_name
from memadvise.plan.schema import Setting
from memadvise.probe.checks import eight_bit_problems, idle_problem, rank_agreement
from memadvise.probe.partitions import choose_partition, partition_sizes, prior_partition
from memadvise.probe.schedule import Schedule
from memadvise.probe.shadow import TensorShadows
from memadvise.probe.snr import SNR_RULES, SnrRule, SnrTrajectory, rules_from_snr
from memadvise.probe.training import Moments, TrainingLog, is_out_of_memory
from memadvise.probe.waves import Wave

_NO_GRADIENT = "never received a gradient"


class Collected:
    """Statistics by parameter name; ``prior``: what an interrupted probe measured, to be completed."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        settings: Mapping[str, Sequence[Setting]],
        snr_rule: SnrRule,
        prior: ProbeLedger | None = None,
    ) -> None:
        self.parameters = parameters
        self.settings = settings
        self.snr_rule: SnrRule = snr_rule
        self.prior = {p.name: p for p in prior.parameters} if prior else {}
        self.snr: dict[str, SnrTrajectory] = {}
        self.shadows: dict[str, TensorShadows] = {}
        self.hessian: dict[str, tuple[HessianValue, ...]] = {}
        self.unknown: dict[str, str] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.recorded: list[int] = []
        self.first_step = 0  # of the window whose records count

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensor of every probed parameter, by the ledger's name."""
        live = {canonical_name(name): tensor for name, tensor in model.named_parameters()}
        found: dict[str, Tensor] = {}
        for parameter in self.parameters:
            name = next((name for name in (parameter.name, *parameter.aliases) if name in live), None)
            if name is None:
                self.unknown[parameter.name] = "not found in the model that was trained"
            elif live[name].is_complex():
                self.unknown[parameter.name] = "complex-valued: not measured"
            else:
                found[parameter.name] = live[name]
        return found

    def record(self, step: int, tensors: Mapping[str, Tensor], moments: Moments) -> None:
        """The SNR of every parameter at one step."""
        self.recorded.append(step)
        for name, tensor in tensors.items():
            state = moments.of(tensor)
            if state is None or name in self.unknown:
                continue
            try:
                self.snr.setdefault(name, SnrTrajectory()).add(state[1])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.unknown[name] = "out of memory while measuring its second moment"
                self.snr.pop(name, None)

    def is_known(self, name: str, schedule: Schedule) -> bool:
        """Whether an interrupted probe finished watching a parameter."""
        prior = self.prior.get(name)
        return prior is not None and prior.unknown is None and prior.num_recorded >= len(schedule.recorded)

    def take(self, wave: Wave) -> None:
        """What a pass measured (so far); of a tensor watched twice, the pass that recorded more."""
        for name, found in wave.results.items():
            if name not in self.shadows or found.num_recorded >= self.shadows[name].num_recorded:
                self.shadows[name] = found
        for name, reason in wave.failed.items():
            if name in self.shadows and self.shadows[name].num_recorded:
                self.warn(f"{name}: {reason}; the {self.shadows[name].num_recorded} steps recorded before are kept")
            else:
                self.unknown.setdefault(name, reason)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)

    def agreement(self) -> float | None:
        """See :func:`memadvise.probe.checks.rank_agreement`."""
        return rank_agreement(value for p in self.parameters for value in self.fidelity(p.name))

    def fidelity(self, name: str) -> tuple[FidelityValue, ...]:
        """What the shadows of a parameter measured; AdamW differs from itself by nothing."""
        shadows = self.shadows.get(name)
        if shadows is None and name in self.prior:
            return self.prior[name].fidelity
        found = shadows.values(self.first_step) if shadows is not None else ()
        dense = DENSE in self.settings.get(name, ()) and (name in self.snr or bool(found))
        return (*((FidelityValue(DENSE.key, 0.0, 0.0),) if dense else ()), *found)

    def ledger(self, lr: float, log: TrainingLog, runs: Sequence[OptimizerRun], **facts: object) -> ProbeLedger:
        """Everything, as a record; ``facts``: fields of it that are known elsewhere."""
        if log.problem:
            kept = "the statistics recorded before are kept" if self.recorded else "nothing was recorded before"
            self.warn(f"the AdamW probe ended early: {log.problem}; {kept}")
        if self.recorded and self.parameters and not self.snr and not self.unknown and not self.prior:
            self.warn("no parameter ever received a gradient: does train_step call backward() and optimizer.step()?")
        if log.loss_problem:
            self.warn(f"losses are unknown: {log.loss_problem}")
        if (idle := idle_problem(log.updates, log.idle_updates)) is not None:
            self.warn(idle)
        for problem in eight_bit_problems({p.name: self.fidelity(p.name) for p in self.parameters}):
            self.warn(problem)
        missing = f"{log.problem}, before anything was recorded" if log.problem and not self.recorded else _NO_GRADIENT
        if facts.get("complete") is False and not self.recorded:
            missing = "interrupted before anything was recorded"
        record = ProbeLedger(
            num_steps=log.num_steps,
            recorded_steps=tuple(self.recorded),
            lr=lr,
            losses=tuple(log.losses),
            parameters=tuple(self._probe(parameter, missing) for parameter in self.parameters),
            runs=tuple(runs),
            warnings=tuple(self.warnings),
            rank_agreement=self.agreement(),
            snr_rule=self.snr_rule,
            notes=tuple(self.notes),
        )
        return replace(record, **facts)  # type: ignore[arg-type]

    def _probe(self, parameter: Parameter, missing: str) -> ParameterProbe:
        name = parameter.name
        prior, measured, shadows = self.prior.get(name), self.snr.get(name), self.shadows.get(name)
        if prior is not None and measured is None and shadows is None:
            return prior
        snr = measured.values() if measured else prior.snr if prior else ()
        hessian = self.hessian.get(name) or (prior.hessian if prior else ())
        partition = evidence = None
        clear = False
        if sizes := partition_sizes(parameter):
            partition, evidence, clear = choose_partition(hessian, sizes, prior=prior_partition(parameter))
        if shadows is not None:
            sampled, count = shadows.sampled, shadows.num_recorded
        elif prior is not None and prior.num_recorded and len(prior.fidelity) > 1:
            sampled, count = prior.sampled, prior.num_recorded
        else:
            sampled, count = None, measured.num_steps if measured else 0
        return ParameterProbe(
            name=name,
            snr=snr,
            fidelity=() if name in self.unknown else self.fidelity(name),
            hessian=hessian,
            unknown=self.unknown.get(name, None if snr or measured is not None else missing),
            snr_axes=rules_from_snr(snr, policy=SNR_RULES[self.snr_rule], shape=parameter.shape),
            partition=partition,
            partition_evidence=evidence,
            partition_measured=clear,
            sampled=sampled,
            num_recorded=count,
        )
