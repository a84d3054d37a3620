"""What-ifs: the step traced again under other switches, and which switches a target can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from memadvise.batches import batch_size
from memadvise.errors import UsageError
from memadvise.ledger import MemoryLedger
from memadvise.plan.schema import Plan, Setting, Switches
from memadvise.switches import checkpoint_patterns
from memadvise.target import Target

if TYPE_CHECKING:
    from typing import Any

    from torch import nn

    from memadvise.memory.architecture import DeviceModel

_MICRO_BATCHES = (2, 4)
_FLAGS = {"fused": "fused=True", "foreach": "foreach=True", "for-loop": "foreach=False"}
_CLASSES = {"adamw": "memadvise.optim.AdamW"}
AUTO = "auto"  # a checkpoint pattern: the repeated blocks
_LR = 1e-3  # no byte depends on it


def trace_setting(
    target: Target,
    plan: Plan | Setting,
    *,
    device: str | DeviceModel,
    switches: Switches | None = None,
    label: str,
    extrapolate_depth: bool = False,
    tensors: str = "auto",
) -> MemoryLedger:
    """Trace one step with memadvise's own engine executing ``plan``; ``switches`` default to the plan's own. For
    ``extrapolate_depth`` the plan has to treat equal blocks alike; that and ``tensors`` are those of
    :func:`memadvise.memory.estimate.estimate`.

    Raises:
        PlanError, OptimizerError: the plan or a switch does not fit the model. UsageError: the batch does not.
        TargetError, TargetRaised: the target's code is at fault.
    """
    from memadvise.memory.estimate import estimate
    from memadvise.optim.create import create_optimizer, hold_weights

    chosen = switches or (plan.switches if isinstance(plan, Plan) else Switches())
    return estimate(
        target,
        device=device,
        prepare=lambda model: hold_weights(model, plan, switches=chosen),
        optimizer=lambda model: create_optimizer(model, plan, lr=_LR, switches=chosen),
        optimizer_name=label,
        switches=chosen,
        extrapolate_depth=extrapolate_depth,
        tensors=tensors,
    )


@dataclass(frozen=True)
class WhatIf:
    """One way to run the step: under ``switches``, with torch's AdamW or with memadvise's engine executing ``plan``.

    ``implementation``: of torch's AdamW, "fused", "foreach" or "for-loop"; None leaves it to torch. Gradient release
    and other forms of weights need the engine, which then runs AdamW in full if there is no plan.
    """

    switches: Switches = field(default_factory=Switches)
    plan: Plan | Setting | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.implementation is not None and self.engine is not None:
            raise UsageError(
                f"{self.implementation} is about torch.optim.AdamW; gradient release, other weights and plans are run "
                "by memadvise's optimizers",
                hint="leave it out: their AdamW is fused where torch's can be",
            )

    @property
    def engine(self) -> Plan | Setting | None:
        """What memadvise's engine executes; None for torch's AdamW."""
        needed = self.switches.gradient_release or self.switches.weights is not None
        return self.plan if self.plan is not None else Setting("adamw") if needed else None


def trace_what_if(target: Target, what_if: WhatIf, *, device: str | DeviceModel) -> MemoryLedger:
    """Trace one step of ``target`` as ``what_if`` says; raises as :func:`trace_setting`."""
    from memadvise.memory.estimate import estimate
    from memadvise.memory.tensors import default_optimizer

    engine = what_if.engine
    if engine is not None:
        label = "memadvise plan" if isinstance(engine, Plan) else f"memadvise {engine.key}"
        return trace_setting(target, engine, device=device, switches=what_if.switches, label=label)
    return estimate(
        target,
        device=device,
        optimizer=lambda model: default_optimizer(model, what_if.implementation),
        switches=what_if.switches,
    )


def how_to(what_if: WhatIf) -> str:
    """What to write to run so; empty for torch's AdamW as it stands."""
    switches, engine = what_if.switches, what_if.engine
    parts = [f"torch.optim.AdamW(..., {_FLAGS[what_if.implementation]})"] if what_if.implementation else []
    if isinstance(engine, Plan):
        parts.append(f"create_optimizer(model, {engine.path or 'plan'!r}, lr=...)")
    elif engine is not None:
        options = "".join(f", {name}={value!r}" for name, value in engine.options.items())
        made = f"{_CLASSES.get(engine.method, engine.method)}(params, lr=...{options})"
        parts += ["quantize_weights(model)"] if switches.weights == "int8" else []
        parts.append(f"release.attach(model, lambda params: {made})" if switches.gradient_release else made)
    if isinstance(engine, Plan) and what_if.switches != engine.switches:
        parts.append("switches in the plan: " + (switches.describe() or "none"))
    if switches.checkpoint:
        parts.append(f"apply_checkpoint(model, {list(switches.checkpoint)})")
    if switches.micro_batches > 1:
        parts.append("split_batch(batch, number of micro-batches)")
    return "; ".join(parts)


def switch_variants(target: Target, model: nn.Module, batch: Any) -> list[Switches]:
    """The combinations of switches that cost time alone and that this target can run, no switch first."""
    counts = [1, *(n for n in _MICRO_BATCHES if refusal(target, model, batch, Switches(n)) is None)]
    patterns = checkpoint_patterns(model)
    checkpoints = [(), patterns] if patterns else [()]
    accumulated = [Switches(n, checkpoint) for checkpoint in checkpoints for n in counts]
    return accumulated + [Switches(1, checkpoint, gradient_release=True) for checkpoint in checkpoints]


def weight_variants(model: nn.Module) -> list[str]:
    """The forms of ``switches.weights`` that take bytes off this model, the most precise first."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    forms = ["ecc16", "ecc8", "stochastic"] if any(p.dtype.itemsize == 4 for p in trainable) else []
    forms = [form for form in forms if form != "ecc16"]  # two bytes and two more are what float32 has
    return forms + (["int8"] if any(p.ndim >= 2 and p.is_floating_point() for p in trainable) else [])


def settled(what_if: WhatIf, target: Target, model: nn.Module, batch: Any) -> WhatIf:
    """``what_if`` with the repeated blocks of ``model`` in place of the checkpoint pattern "auto".

    Raises:
        UsageError: the target cannot run so, or has no repeated blocks.
    """
    switches = what_if.switches
    if AUTO in switches.checkpoint:
        found = checkpoint_patterns(model)
        if not found:
            raise UsageError(
                f"{target.spec} has no repeated blocks to checkpoint",
                hint="name modules instead of 'auto', as in model.named_modules()",
            )
        named = tuple(pattern for pattern in switches.checkpoint if pattern != AUTO)
        switches = replace(switches, checkpoint=(*found, *named))
    reason = refusal(target, model, batch, switches)
    if reason is not None:
        raise UsageError(f"{switches.describe()}: {reason}", hint="leave --micro-batches out")
    return replace(what_if, switches=switches)


def refusal(target: Target, model: nn.Module, batch: Any, switches: Switches) -> str | None:
    """Why this target cannot run under ``switches``, in a sentence; None if nothing is known against it.

    What only a trace shows (clipping between backward and a step that was made inside it, a second gradient) is raised
    there.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    parts = switches.micro_batches
    if parts == 1:
        return None
    if target.train_step is not None:
        return f"{target.spec} has its own train_step, which decides itself how a batch is split"
    size = batch_size(batch)
    if size is None:
        return "the tensors of a batch have no common first dimension along which it could be split in micro-batches"
    if size % parts:
        return f"a batch of {size} cannot be split in {parts} equal micro-batches"
    norm = next((name for name, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if norm is not None:
        return f"the batch norm {norm} would see the statistics of {size // parts} samples instead of {size}"
    return None
