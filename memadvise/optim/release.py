"""Optimizer in backward: every parameter makes its step as soon as its gradient is complete, and the gradient is freed.

The gradients of a model are then never alive together; their peak is about the largest single one instead of all::

    from memadvise.optim import AdamW, release

    optimizer = release.attach(model, lambda params: AdamW(params, lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    for batch in batches:
        loss(model, batch).backward()  # the weights move here
        optimizer.step()               # ends the iteration; nothing is left to move
        scheduler.step()
        optimizer.zero_grad()          # harmless
    torch.save(optimizer.state_dict(), path)  # the plain optimizer's, either loads the other's

The weights after N iterations are those of the ordinary loop, bit for bit. What needs all gradients at once, or a
gradient after backward, cannot work and is refused with a sentence:

* clipping by global norm, and whatever else reads or changes gradients after backward: where a gradient was stands a
  placeholder without memory until ``step()``, and the first operation on it raises;
* accumulation, a second backward before ``step()``: the second gradient of a parameter raises, and names it. The same
  happens to a tied parameter in re-entrant checkpointing, where every segment has a backward of its own
  (``use_reentrant=False`` completes gradients first);
* ``GradScaler``: the steps are made before it can unscale anything (bfloat16 needs no scaler);
* ``backward(create_graph=True)`` and DistributedDataParallel, which averages gradients after they are complete.

A refusal comes after the steps of that backward: it tells of a mistake in the loop, at its first iteration. A loss that
turns out to be NaN cannot be skipped either. When backward itself fails (an exception, no memory left), some parameters
have made their step and others have not, each with its state whole; ``zero_grad()`` and ``step()`` begin anew.

A learning rate (or any other entry of ``param_groups``) counts from the next backward on. Hooks of
``register_step_pre_hook`` run around ``step()``, when the weights have moved already.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from memadvise.errors import OptimizerError
from memadvise.names import canonical_name
from memadvise.optim.optimizer import MemadviseOptimizer, ParameterMemory
from memadvise.plan.schema import Setting

Factory = Callable[[list[tuple[str, nn.Parameter]]], "MemadviseOptimizer | ReleasedOptimizer"]


def attach(model: nn.Module, factory: Factory, *, guard: bool = True) -> ReleasedOptimizer:
    """Let the optimizer that ``factory`` makes step inside backward.

    Args:
        model: its trainable parameters are offered to ``factory``.
        factory: takes ``(name, parameter)`` pairs, tied parameters once, and returns a memadvise optimizer of them (or
            of some): ``lambda params: AdamW(params, lr=1e-3)``, or
            ``lambda _: create_optimizer(model, "plan.yaml", lr=1e-3)`` (one that a plan's ``gradient_release`` has
            attached already is returned as it is).
        guard: leave a placeholder, which refuses to be read, in place of a freed gradient until ``step()``; False
            leaves None, and clipping by global norm then silently does nothing.

    Raises:
        OptimizerError: a model in DistributedDataParallel, one that is attached already, an optimizer of another kind
            or of other parameters.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise OptimizerError(
                "DistributedDataParallel averages gradients after they are complete, too late for a step in backward",
                hint="use fully_shard, whose gradients arrive averaged, or the plain optimizer",
            )
    named = ((canonical_name(name), p) for name, p in model.named_parameters())
    optimizer = factory([(name, p) for name, p in named if p.requires_grad])
    if isinstance(optimizer, ReleasedOptimizer) and optimizer.is_of(model):
        return optimizer
    if not isinstance(optimizer, MemadviseOptimizer):
        raise OptimizerError(
            f"the factory returned a {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            hint="return one of memadvise.optim: its AdamW is torch's bit for bit",
        )
    # asked anew: a plan may have made int8 weights of some
    names: dict[Tensor, str] = {p: canonical_name(name) for name, p in model.named_parameters()}
    return ReleasedOptimizer(optimizer, names, guard=guard)


class ReleasedOptimizer(Optimizer):
    """What :func:`attach` returns: the groups, the state and the state dict of ``optimizer``, which steps in backward.

    Attributes:
        optimizer: the plain optimizer; its own ``step`` is not to be called while this one is attached.
    """

    optimizer: MemadviseOptimizer

    def __init__(self, optimizer: MemadviseOptimizer, names: dict[Tensor, str], *, guard: bool) -> None:
        self._names, self._guard = names, guard
        self._attached, self._hooks = True, dict[Tensor, Any]()
        self._stepped: set[Tensor] = set()  # in this iteration
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._spent: dict[Tensor, _Spent] = {}
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._share()
        self._hook()

    def _share(self) -> None:
        """One set of groups and one state, whichever of the two optimizers is asked."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _hook(self) -> None:
        """Hook the parameters that want gradients and have no hook yet: at first all, later some that were frozen."""
        fresh = [p for p in self._parameters() if self._attached and p.requires_grad and p not in self._hooks]
        for p in fresh:
            if p not in self._names:
                raise OptimizerError(
                    "the factory's optimizer holds a parameter that is not of this model",
                    hint="make it of the parameters that the factory is given",
                )
            others = [hook for hook in _hooks_of(p).values() if isinstance(hook, _Hook)]
            if any(hook.owner() is not None for hook in others):
                raise OptimizerError(
                    f"{self._names[p]} has an optimizer in backward already", hint="call its detach() first"
                )
        for p in fresh:
            for key in [key for key, hook in _hooks_of(p).items() if isinstance(hook, _Hook)]:
                del _hooks_of(p)[key]  # of an optimizer that is gone
            self._hooks[p] = p.register_post_accumulate_grad_hook(_Hook(self, self._names[p]))

    def is_of(self, model: nn.Module) -> bool:
        """Whether it steps parameters of ``model``."""
        return set(self._parameters()) <= set(model.parameters())

    # ------------------------------------------------------------ in backward

    def on_gradient(self, p: Tensor) -> None:
        """The gradient of ``p`` is complete: step it, free it."""
        if not self._stepped:  # groups may have changed since the last iteration
            self._groups = {p: group for group in self.param_groups for p in group["params"]}
        if p.grad is None or p not in self._groups:
            return
        if p in self._stepped:
            raise _second(self._names[p])
        if p.grad.requires_grad:
            raise OptimizerError(
                f"backward(create_graph=True) keeps the gradient of {self._names[p]}, which is freed in backward here",
                hint="use torch.autograd.grad for the inner derivative",
            )
        self.optimizer.step_parameters(self._groups[p], [p])
        self._stepped.add(p)
        p.grad = self._placeholder(p) if self._guard else None

    def _placeholder(self, p: Tensor) -> _Spent:
        spent = self._spent.get(p)
        if spent is None or (spent.shape, spent.dtype, spent.device) != (p.shape, p.dtype, p.device):
            spent = self._spent[p] = _Spent(p, self._names[p])
        return spent

    # ------------------------------------------------------------ the optimizer of a training loop

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """End the iteration: the weights have moved in backward, and every gradient is None afterwards.

        Only gradients that did not come from backward (set by hand, as when a checkpoint primes an optimizer) still
        make their step here.

        Args:
            closure: called once, first, with gradients enabled; its backward moves the weights.

        Raises:
            OptimizerError: after :meth:`detach`; for a gradient set by hand on a parameter that was stepped already.
        """
        if not self._attached:
            raise OptimizerError("this optimizer was detached", hint="step the one that detach() returned")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_hand = [p for p in self._parameters() if p.grad is not None and not isinstance(p.grad, _Spent)]
        for p in by_hand:
            if p in self._stepped:
                raise _second(self._names[p])
        self._forget()
        if by_hand:
            self.optimizer.step()
        self.zero_grad()
        self._stepped.clear()
        self._hook()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every gradient to None (whatever ``set_to_none``): nothing is kept for the next backward to add to."""
        for p in self._parameters():
            p.grad = None

    def _forget(self) -> None:
        for p in self._parameters():
            if isinstance(p.grad, _Spent):
                p.grad = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step looks here first: with no gradient left it would fail in words that help nobody.
        raise _scaled()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new parameters are of the model, and step in backward too."""
        if "optimizer" not in self.__dict__:  # torch's __init__ adopts the groups
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        try:
            self._hook()
        except OptimizerError:
            self.optimizer.param_groups.pop()
            raise

    def detach(self) -> MemadviseOptimizer:
        """Take the hooks off and return the plain optimizer, with its state, for an ordinary loop from here on."""
        for handle in self._hooks.values():
            handle.remove()
        self._attached = False
        self._hooks.clear()
        self._stepped.clear()
        self._forget()
        return self.optimizer

    def memory(self) -> tuple[ParameterMemory, ...]:
        """As :meth:`MemadviseOptimizer.memory`."""
        return self.optimizer.memory()

    def settings(self) -> dict[str, Setting]:
        """Parameter name -> the setting that is executed."""
        return self.optimizer.settings()

    # ------------------------------------------------------------ state in and out

    def state_dict(self) -> dict[str, Any]:
        """That of the plain optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """As :meth:`MemadviseOptimizer.load_state_dict`; a new iteration begins."""
        self.optimizer.load_state_dict(state_dict, convert=convert)
        self._share()
        self._forget()
        self._stepped.clear()

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registered with the plain optimizer, which is what the hook is given."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registered with the plain optimizer, which is what the hook is given."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registered with the plain optimizer, which is what the hook is given."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registered with the plain optimizer, which is what the hook is given."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse_copy()

    def _refuse_copy(self) -> NoReturn:
        raise OptimizerError(
            "an optimizer in backward cannot be copied or pickled: its hooks sit on the parameters of this very model",
            hint="save state_dict(), or copy .optimizer with the model; attach to the copy of the model",
        )


class _Hook:
    """What sits on a parameter. Weak: the garbage collector does not see hooks, and the model would never be freed."""

    def __init__(self, owner: ReleasedOptimizer, name: str) -> None:
        self.owner, self.name = weakref.ref(owner), name

    def __call__(self, p: Tensor) -> None:
        owner = self.owner()
        if owner is None:
            raise OptimizerError(
                f"the optimizer in backward of {self.name} is gone: nobody holds what release.attach() returned",
                hint="keep it, or end it with detach()",
            )
        owner.on_gradient(p)


def _hooks_of(p: Tensor) -> dict[int, Any]:
    return getattr(p, "_post_accumulate_grad_hooks", None) or {}


class _Spent(Tensor):
    """Stands where a gradient was, without any memory; any operation on it raises, under a trace as well.

    Without it ``clip_grad_norm_`` finds no gradients after backward and returns 0, and a training loop goes on without
    the clipping it asks for.
    """

    of: str

    @staticmethod
    def __new__(cls, p: Tensor, name: str) -> _Spent:
        spent: _Spent = Tensor._make_wrapper_subclass(cls, p.shape, dtype=p.dtype, device=p.device)
        spent.of = name
        return spent

    def __init__(self, p: Tensor, name: str) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        found = (x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(x, cls))
        name, operation = next((spent.of for spent in found), "a parameter"), str(func)
        if operation.startswith(("aten.add.", "aten.add_.")):  # what backward does to a gradient that is there already
            raise _second(name)
        if "zero_" in operation:
            raise OptimizerError(
                f"the gradient of {name} was freed in backward and cannot be set to zero", hint="use set_to_none=True"
            )
        if "_amp_" in operation:
            raise _scaled()
        raise OptimizerError(
            f"the gradient of {name} was used in backward and freed: {operation.removeprefix('aten.')} cannot have it",
            hint="leave out what reads gradients after backward (clipping by global norm, DistributedDataParallel), "
            "or train in the ordinary way, with the optimizer that detach() returns",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<the gradient of {self.of}, used in backward and freed>"


def _second(name: str) -> OptimizerError:
    return OptimizerError(
        f"{name} got a second gradient before step(): it was stepped with the first one, in backward",
        hint="call step() after every backward, without accumulating micro-batches; and checkpoint with "
        "use_reentrant=False if it is a tied parameter",
    )


def _scaled() -> OptimizerError:
    return OptimizerError(
        "GradScaler does not go with an optimizer in backward: the weights were stepped with scaled gradients",
        hint="use bfloat16 autocast without a scaler, from the weights before this backward",
    )
