"""Which phase of the step and which module is running, from hooks that leave the computation alone.

A step begins in "forward". The autograd engine running is "backward"; what follows it is "step" (clipping, the
optimizer, zero_grad) until a module runs forward again, as with accumulated gradients or a closure. Between the
pre and post hooks of any ``torch.optim.Optimizer.step`` it is "step" as well, also inside the backward pass.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memadvise.names import canonical_name


class Phases:
    """The running phase and the stack of running modules, kept up to date while :meth:`hooked` is open.

    Args:
        model: its module names are reported; modules outside it are reported by their class.
        on_phase: called with the new phase whenever it changes.
        on_stepped: called with the optimizer after each of its steps.
        on_module: called with the name of the module that runs now ("" for none), whenever it changes.
    """

    running: ClassVar[Phases | None] = None  # the one that is hooked now, for what runs modules in its own way

    def __init__(
        self,
        model: nn.Module,
        *,
        on_phase: Callable[[str], None],
        on_stepped: Callable[[torch.optim.Optimizer], None] | None = None,
        on_module: Callable[[str], None] | None = None,
    ) -> None:
        self.phase = "setup"
        self.modules: list[str] = []
        self.creates_graph = False
        self._names = {id(module): canonical_name(name) for name, module in model.named_modules()}
        self._on_phase = on_phase
        self._on_stepped = on_stepped
        self._on_module = on_module
        self._engine_depth = 0
        self._interrupted: list[str] = []

    def enter(self, phase: str) -> None:
        """Say that ``phase`` runs from now on."""
        if phase != self.phase:
            self.phase = phase
            self._on_phase(phase)

    @property
    def in_engine(self) -> bool:
        """Whether the autograd engine runs, which has a thread of its own on CUDA."""
        return self._engine_depth > 0

    @property
    def recomputing(self) -> bool:
        """Whether a checkpointed module is being computed again: gradients are on inside a plain backward pass."""
        return self._engine_depth > 0 and torch.is_grad_enabled() and not self.creates_graph

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Install the hooks, and take them away again whatever happens."""
        autograd: Any = torch.autograd  # every way into the engine goes through this name
        run_engine = autograd._engine_run_backward

        def run_backward(tensors: Any, grads: Any, keep: Any, create_graph: Any, *args: Any, **kwargs: Any) -> Any:
            interrupted, self._engine_depth = self.phase, self._engine_depth + 1
            outer, self.creates_graph = self.creates_graph, self.creates_graph or bool(create_graph)
            self.enter("backward")
            try:
                return run_engine(tensors, grads, keep, create_graph, *args, **kwargs)
            finally:
                self._engine_depth, self.creates_graph = self._engine_depth - 1, outer
                self.enter(interrupted if self._engine_depth else "step")

        handles = [
            register_module_forward_pre_hook(self._module_enters),
            register_module_forward_hook(self._module_leaves, always_call=True),
            register_optimizer_step_pre_hook(self._optimizer_enters),
            register_optimizer_step_post_hook(self._optimizer_leaves),
        ]
        autograd._engine_run_backward = run_backward
        outside, Phases.running = Phases.running, self
        try:
            with warnings.catch_warnings():  # the hooks are ours, and a repeated call of one does no harm
                warnings.filterwarnings("ignore", message=".*torch.compile.* when there are global hooks on modules")
                yield
        finally:
            Phases.running = outside
            autograd._engine_run_backward = run_engine
            for handle in handles:
                handle.remove()

    def _module_enters(self, module: nn.Module, args: Any) -> None:
        if self.phase == "step" and not self.modules and not self._engine_depth:
            self.enter("forward")
        name = self._names.get(id(module))
        if name is None:  # made while running, or not a part of the model
            name = self.modules[-1] if self.modules else type(module).__name__
        self.modules.append(name)
        if self._on_module is not None:
            self._on_module(name)

    def _module_leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.modules:
            self.modules.pop()
        if self._on_module is not None:
            self._on_module(self.modules[-1] if self.modules else "")

    def _optimizer_enters(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._interrupted.append("backward" if self._engine_depth else "step")
        self.enter("step")

    def _optimizer_leaves(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._on_stepped is not None:
            self._on_stepped(optimizer)
        self.enter(self._interrupted.pop() if self._interrupted else "step")
