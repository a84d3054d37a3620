"""The memory of a step under ``torch.compile``, as an upper bound, on fake tensors.

Inductor's code allocates below the dispatcher, where no trace sees it. What it allocates follows from two graphs that
can be had without it: dynamo captures the model's forward pass, AOTAutograd traces it together with its backward pass,
inductor's decompositions and the min-cut partitioner decide which values are kept for the backward pass and which are
computed again. Both graphs then run in the trace, operation by operation, every value freed after its last use.
Inductor fuses operations and never makes many of these values: so this is a bound from above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all_modules
from torch.utils._python_dispatch import _disable_current_modes

from memadvise.errors import MemadviseError
from memadvise.ledger import MemoryLedger
from memadvise.memory.architecture import DeviceModel
from memadvise.memory.estimate import estimate
from memadvise.memory.phases import Phases
from memadvise.memory.trace import MakeOptimizer
from memadvise.names import canonical_name
from memadvise.target import Target
from memadvise.units import format_bytes

_BOUND = (
    "Under torch.compile this is an upper bound: the forward and backward graphs as AOTAutograd partitions them, run "
    "operation by operation; inductor fuses operations and allocates less."
)


@dataclass
class Capture:
    """What was compiled: graphs, what they keep for the backward pass, and where dynamo broke off."""

    graphs: int = 0
    saved_bytes: int = 0
    breaks: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """What to say about it."""
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return [
            _BOUND,
            f"torch.compile: {graphs} of the model; they keep {format_bytes(self.saved_bytes)} for the backward pass "
            "beside weights and inputs.",
        ]


def estimate_compiled(
    target: Target,
    *,
    device: str | DeviceModel = "cuda",
    optimizer: MakeOptimizer | None = None,
    eager: MemoryLedger | None = None,
) -> MemoryLedger:
    """An upper bound for the memory of one steady step with ``torch.compile(model)``; nothing is computed.

    Where the model cannot be compiled, the estimate of eager execution with a warning that says why.

    Args:
        target: the model, its batches and its step.
        device: as for :func:`memadvise.memory.estimate.estimate`.
        optimizer: ``model -> torch.optim.Optimizer``; default ``torch.optim.AdamW``, which is not compiled.
        eager: the estimate of eager execution, if it is there already.

    Raises:
        TargetError, TargetRaised: the target's code is at fault, compiled or not.
    """
    capture = Capture()
    problem = None
    before = _noted()
    try:
        ledger = estimate(
            target, device=device, optimizer=optimizer, prepare=lambda model: compile_model(model, capture)
        )
    except MemadviseError as error:
        problem = _cause(error)
    for reason, count in _noted().items():  # before its first operation a frame has no graph that tells of a break
        if count > before.get(reason, 0) and not any(told.startswith(reason) for told in capture.breaks):
            capture.breaks[reason] = 1
    if problem is None and not capture.graphs:
        problem = "; ".join(capture.breaks) or "dynamo captured no graph of it"
    if problem is not None:
        eager = eager or estimate(target, device=device, optimizer=optimizer)
        said = f"torch.compile: the model could not be compiled ({problem}); this is the estimate of eager execution"
        return replace(eager, warnings=(*eager.warnings, said))
    breaks = [
        f"torch.compile breaks the graph{f' {count} times' if count > 1 else ''}: {reason}"
        for reason, count in capture.breaks.items()
    ]
    return replace(
        ledger,
        source="bound",
        assumptions=(*capture.sentences(), *ledger.assumptions),
        warnings=(*ledger.warnings, *breaks),
    )


def _cause(error: BaseException) -> str:
    """What torch said, in one line."""
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:300]}"


def compile_model(model: nn.Module, capture: Capture) -> None:
    """Let the forward pass of ``model`` run as ``torch.compile`` would partition it, and fill ``capture`` meanwhile."""
    inner = getattr(model, "_orig_mod", model)  # of a model that its builder has compiled already
    names = {canonical_name(name) for name, _ in inner.named_modules()}
    weights: Any = next(inner.parameters())
    fake_mode = weights.fake_mode
    forward = torch.compile(inner.forward, backend=_backend(capture, names), dynamic=False)
    known: set[str] = set()

    def run(*args: Any, **kwargs: Any) -> Any:
        # A compiled graph has no hooks in it, and its operations carry the modules that they come from.
        with torch.compiler.set_stance("default"), _without_hooks(), torch._C.DisableTorchFunction():
            key = repr((torch.is_grad_enabled(), inner.training, _described((args, kwargs))))
            if key not in known:
                # Dynamo does not compile under a mode of somebody else's, such as the recorder of a trace.
                with _disable_current_modes(), fake_mode:
                    forward(*args, **kwargs)
                known.add(key)
            return forward(*args, **kwargs)

    inner.forward = run  # type: ignore[method-assign]


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, dict):
        return [(key, _described(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return value if isinstance(value, int | float | str | None) else type(value).__name__


@contextlib.contextmanager
def _without_hooks() -> Iterator[None]:
    """Without hooks on all modules, which would be compiled into the graph."""
    tables: Any = [hooks_of_all_modules._global_forward_pre_hooks, hooks_of_all_modules._global_forward_hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, kept, strict=True):
            table.update(entries)


def _backend(capture: Capture, names: set[str]) -> Callable[..., Any]:
    """A backend of ``torch.compile``: inductor's graphs, run operation by operation."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def partition(joint: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **{**options, "compiler": "inductor"})
        capture.saved_bytes += _saved_bytes(forward, options["num_fwd_outputs"])
        return forward, backward

    def interpreted(graph: Any, inputs: Any) -> Any:
        interpreter = _Interpreter(graph, names)

        def run(args: list[Any]) -> Any:
            try:
                return interpreter.boxed_run(args)  # takes the arguments out of the list, so that each can end early
            finally:
                interpreter.env = {}  # it would hold what it has returned

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    aot = aot_autograd(
        fw_compiler=interpreted, bw_compiler=interpreted, partition_fn=partition, decompositions=select_decomp_table()
    )

    def backend(graph: Any, inputs: Any) -> Any:
        capture.graphs += 1
        reason = getattr(graph, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            told = _told(reason)
            capture.breaks[told] = capture.breaks.get(told, 0) + 1
        return aot(graph, inputs)

    return backend


def _told(reason: Any) -> str:
    """Why dynamo broke off, and at which line of the user's."""
    noted = _noted()  # in the order in which they came; some reasons say no more than a code
    told = _first_line(reason.reason) if " " in str(reason.reason).strip() or not noted else list(noted)[-1]
    where = reason.user_stack[-1] if reason.user_stack else None
    return f"{told}{f' at {where.filename}:{where.lineno}' if where is not None else ''}"


def _noted() -> dict[str, int]:
    """The reasons of all graph breaks that dynamo has counted, and how often they came."""
    from torch._dynamo.utils import counters

    return {_first_line(reason): count for reason, count in counters["graph_break"].items()}


def _first_line(text: Any) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "unknown")


def _saved_bytes(forward: Any, num_outputs: int) -> int:
    """Bytes that the forward graph hands to the backward graph, without its inputs."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    inputs = {_storage(node) for node in forward.graph.nodes if node.op == "placeholder"}
    saved: dict[int, int] = {}
    for node in output.args[0][num_outputs:]:
        key = _storage(node)
        if key is not None and key not in inputs:
            saved[key] = node.meta["val"].untyped_storage().nbytes()
    return sum(saved.values())


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if hasattr(node, "meta") else None
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph, frees every value after its last use, and says which module of the model each operation is of."""

    def __init__(self, graph: Any, names: set[str]) -> None:
        super().__init__(graph)
        self._modules = {node: _module_of(node, names) for node in graph.graph.nodes}

    def run_node(self, n: Any) -> Any:
        phases, name = Phases.running, self._modules[n]
        if phases is None or name is None:
            return super().run_node(n)
        phases.modules.append(name)
        try:
            return super().run_node(n)
        finally:
            phases.modules.pop()


def _module_of(node: Any, names: set[str]) -> str | None:
    """The module of the model in which an operation, or the one that it is the backward pass of, was called."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        name = canonical_name(path.removeprefix("L['self']").removeprefix("."))
        if name in names:
            return name
    return None
