"""A torch.optim.Optimizer in which every parameter has its own method. One class for all of them.

State holds tensors only, is made on a parameter's first step (all of its keys together), keeps its own dtypes through
``load_state_dict``, and is saved with a format version and the setting of every parameter: the state of another plan is
refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from memadvise.errors import OptimizerError
from memadvise.names import canonical_name
from memadvise.optim import compose, engine, regroup
from memadvise.optim import convert as conversion
from memadvise.optim.engine import Resolved
from memadvise.optim.method import Hyper, Tensors
from memadvise.optim.registry import ALL_OPTIONS, DENSE, canonical_key, fitted, method_info, parse_setting
from memadvise.plan.schema import Setting

STATE_FORMAT = 1
_KEY = "memadvise"

Params = Iterable[Any]  # tensors, (name, tensor) pairs or dictionaries, as torch.optim takes them


@dataclasses.dataclass(frozen=True)
class ParameterMemory:
    """What one parameter costs: ``state_bytes`` for good, ``scratch_bytes`` (an upper bound) while it is stepped."""

    name: str
    shape: tuple[int, ...]
    setting: str
    executor: str
    state_bytes: int
    scratch_bytes: int


class MemadviseOptimizer(Optimizer):
    """Steps every parameter by its own setting.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or parameter groups of either; groups keep their number and order.
        settings: one setting for all (0-D and 1-D tensors then keep dense AdamW state where the method is meant for
            matrices), or canonical parameter name -> setting, which needs named parameters.
        lr: learning rate, read at every step; a 0-dim tensor works too.
        betas, eps, weight_decay: as in torch.optim.AdamW, decay decoupled.
        executor: "eager", "chunked", "compiled" (where it can be, else chunked) or "fused" for every parameter; None
            chooses for each.

    Raises:
        OptimizerError: a hyper-parameter out of range, a setting that does not fit, a parameter without a setting.
    """

    def __init__(
        self,
        params: Params,
        settings: Setting | Mapping[str, Setting],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        executor: str | None = None,
    ) -> None:
        engine.check_executor(executor)
        if isinstance(settings, Setting):
            parse_setting(settings)
        self._settings = settings if isinstance(settings, Setting) else dict(settings)
        self._executor = executor
        self._resolved: dict[Tensor, Resolved] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters later, as in torch; their setting comes from the one setting, or from their name.

        With one setting for all, a group may override the method's options, ``{"params": [...], "axes": [0]}``, or have
        another method, ``{"params": tables, "method": "adamw", "lr": 1e-3}``, with the common options alone.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        param_group = dict(param_group)
        settings = self._settings
        if isinstance(settings, Setting):
            if "method" in param_group:
                common = {key: value for key, value in settings.options.items() if key in compose.NAMES}
                settings = Setting(param_group.pop("method"), common)
            method = method_info(settings.method).method
            fields = {f.name for f in dataclasses.fields(method.options_type)} | set(compose.NAMES)
            own = {key: param_group.pop(key) for key in fields & set(param_group)}
            settings = Setting(settings.method, {**settings.options, **own})
        before = len(self.param_groups)
        if stray := sorted(ALL_OPTIONS & set(param_group)):
            whose = f"{settings.method} has no such option" if isinstance(settings, Setting) else "the plan decides it"
            raise OptimizerError(
                f"group {before} holds {stray[0]}, which would do nothing: {whose}", hint=f"remove {stray[0]}"
            )
        if not isinstance(param_group["params"], Tensor | set):
            param_group["params"] = list(param_group["params"])
            tensors = [item[1] if isinstance(item, tuple) else item for item in param_group["params"]]
            if len({id(p) for p in tensors}) != len(tensors):
                raise OptimizerError(
                    f"group {before} holds a parameter twice", hint="pass model.named_parameters(): it holds each once"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyper(group)
            found = dict(self._resolve_group(group, before, settings))
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise
        self._resolved.update(found)

    def _resolve_group(
        self, group: dict[str, Any], index: int, settings: Setting | dict[str, Setting]
    ) -> Iterator[tuple[Tensor, Resolved]]:
        params = group["params"]
        names = group.get("param_names")
        for position, p in enumerate(params):
            name = canonical_name(names[position]) if names else f"parameter {position} of group {index}"
            if isinstance(settings, Setting):
                setting = fitted(settings, tuple(p.shape)) if not torch.nn.parameter.is_lazy(p) else settings
            elif name in settings:
                setting = settings[name]
            else:
                raise OptimizerError(
                    f"no setting for {name}",
                    hint="pass (name, parameter) pairs" if not names else "its name is not among those of the plan",
                )
            resolved = engine.resolve(name, p, setting)
            engine.choose_executor(resolved, p, self._executor)
            yield p, resolved

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; parameters without one keep their step count.

        Args:
            closure: re-evaluates the model and returns the loss; called once, first, with gradients enabled.

        Raises:
            OptimizerError: a sparse or complex gradient, or a parameter whose shape or precision changed: then no
                parameter of any group is stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step([(group, group["params"]) for group in self.param_groups])
        return loss

    def step_parameters(self, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        """What :meth:`step` does, for some parameters of one of ``param_groups`` and no others.

        Raises:
            OptimizerError: as :meth:`step`.
        """
        self._step([(group, params)])

    def _step(self, chosen: Iterable[tuple[dict[str, Any], Iterable[Tensor]]]) -> None:
        """Step parameters of some groups. All are checked, and have their state, before the first one moves."""
        made: dict[Tensor, Tensors] = {}
        work: list[tuple[Hyper, list[tuple[Resolved, Tensor, Tensor, Tensors]]]] = []
        with torch.no_grad():
            for group, params in chosen:
                beta1, beta2 = group["betas"]
                lr = group["lr"]
                lr = lr.to(torch.float64) if isinstance(lr, Tensor) else lr  # a float is float64, too
                hyper = Hyper(lr, beta1, beta2, group["eps"], group["weight_decay"])
                work.append((hyper, []))
                for p in params:
                    g, resolved = p.grad, self._resolved[p]
                    if g is not None:
                        engine.check_gradient(resolved, p, g)
                        work[-1][1].append((resolved, p, g, self.state.get(p) or {}))
            for _, items in work:
                for resolved, p, _, state in items:
                    if not state and resolved.specs:
                        executor = engine.choose_executor(resolved, p, self._executor)
                        state.update(engine.new_state(resolved, p, executor))
                        made[p] = state
            self.state.update(made)
            with _no_autocast({p.device.type for _, items in work for _, p, _, _ in items}):
                for hyper, items in work:
                    engine.run(items, hyper, self._executor)

    def memory(self) -> tuple[ParameterMemory, ...]:
        """Per parameter, in order: its setting, executor, and the bytes of its state, known before the first step."""
        return tuple(
            ParameterMemory(
                name=resolved.name,
                shape=resolved.shape,
                setting=resolved.setting.key,
                executor=(executor := engine.choose_executor(resolved, p, self._executor)),
                state_bytes=resolved.recipe.state_bytes,
                scratch_bytes=engine.scratch_bytes(resolved, p, executor),
            )
            for p, resolved in self._in_order()
        )

    def settings(self) -> dict[str, Setting]:
        """Parameter name -> the setting that is executed."""
        return {resolved.name: resolved.setting for _, resolved in self._in_order()}

    def _in_order(self) -> Iterator[tuple[Tensor, Resolved]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, self._resolved[p]

    # ------------------------------------------------------------ state in and out

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with ``"memadvise"``: a format version and the setting of every parameter by its index."""
        state_dict = super().state_dict()
        settings = {index: canonical_key(resolved.setting) for index, (_, resolved) in enumerate(self._in_order())}
        return {**state_dict, _KEY: {"format": STATE_FORMAT, "settings": settings}}

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load what :meth:`state_dict` gave. Tensors are copied, and keep their dtype whatever the parameters' is.

        State of torch.optim.AdamW loads where the setting is adamw.

        Args:
            state_dict: of this plan, or, with ``convert``, of one that differs from it.
            convert: make state of another setting into state of this one where :mod:`memadvise.optim.convert` can, and
                put parameters of other groups by name (:mod:`memadvise.optim.regroup`).

        Raises:
            OptimizerError: a newer format, or state that another setting made (the parameter is named); the optimizer
                is then as it was.
            ValueError: another number of groups or parameters.
        """
        loaded: dict[Tensor, Tensors] = {}
        names = [[self._resolved[p].name for p in group["params"]] for group in self.param_groups]
        if convert and "param_groups" in state_dict and regroup.differs(state_dict, names):
            state_dict = regroup.regrouped(state_dict, self.param_groups, names)

        def withhold(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # torch would cast every tensor to its parameter's dtype: it gets the groups only, after the user's hooks.
            loaded.update(self._read(state_dict, convert))
            return {**state_dict, "state": {}}

        def restore(_: Optimizer) -> None:
            self.state.update(loaded)

        first = self.register_load_state_dict_pre_hook(withhold)
        second = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            second.remove()

    def _read(self, state_dict: dict[str, Any], convert: bool) -> dict[Tensor, Tensors]:
        """New state for every parameter that has some in ``state_dict``; nothing of this optimizer changes."""
        if not {"state", "param_groups"} <= state_dict.keys():
            found = ", ".join(sorted(map(str, state_dict))[:4]) or "nothing"
            raise OptimizerError(f"this is not the state of an optimizer: it holds {found}")
        ours = state_dict.get(_KEY)
        if ours is not None and ours.get("format") != STATE_FORMAT:
            raise OptimizerError(
                f"this optimizer state has format {ours.get('format')}; this memadvise reads format {STATE_FORMAT}",
                hint="load it with the version of memadvise that wrote it",
            )
        counts = [len(group["params"]) for group in state_dict["param_groups"]]
        if counts != [len(group["params"]) for group in self.param_groups]:
            if regroup.differs(state_dict, [[self._resolved[p].name for p in g["params"]] for g in self.param_groups]):
                raise OptimizerError(
                    "this optimizer state has the same parameters in other groups",
                    hint="make the optimizer with the plan (or groups) of this checkpoint, or let "
                    "load_state_dict(..., convert=True) put them by name",
                )
            return {}  # torch says so in its own words
        settings = ours["settings"] if ours is not None else {}
        self._check_order(state_dict)
        read: dict[Tensor, Tensors] = {}
        # numbers as a rule; distributed checkpoints say names
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (p, resolved) in zip(saved, self._in_order(), strict=True):
            state = state_dict["state"].get(index) or {}
            state = self._in_form(resolved, p, settings.get(index), state, convert)
            if state:
                read[p] = self._restored(resolved, p, state)
        return read

    def _check_order(self, state_dict: dict[str, Any]) -> None:
        saved = [name for group in state_dict["param_groups"] for name in group.get("param_names") or ()]
        names, own = [canonical_name(name) for name in saved], [resolved.name for _, resolved in self._in_order()]
        if names != own and sorted(names) == sorted(own):  # state goes by position: it would change hands
            name, other = next(pair for pair in zip(names, own, strict=True) if pair[0] != pair[1])
            raise OptimizerError(
                f"this optimizer state has its parameters in another order: {name} where this optimizer has {other}",
                hint="pass the parameters (or groups) in the order that this checkpoint was trained with",
            )

    @staticmethod
    def _in_form(
        resolved: Resolved, p: Tensor, key: str | None, state: dict[str, Any], convert: bool
    ) -> dict[str, Any]:
        """``state``, which the setting ``key`` made (None: unknown), as that of ``resolved``; it may be empty."""
        name, wanted = resolved.name, canonical_key(resolved.setting)
        if key in (None, wanted):
            problem = engine.state_problem(resolved, state) if state else None
            if problem is None:
                return state
            message = f"this is not the state of {name}: {problem}"
        elif convert and not state:
            return {}
        else:
            message = f"{name} was trained with {key}, this optimizer uses {wanted}"
        hint = "make the optimizer with the plan (or options) that this checkpoint was trained with"
        if key != wanted:
            way = conversion.find(key or DENSE.key, resolved, p)  # without a setting it can only be torch's AdamW
            if isinstance(way, str):
                if convert and key is not None:
                    message += f", which cannot be made of it: {way}"
                    hint += f"; {conversion.POSSIBLE}"
            elif problem := engine.state_problem(way.old, state) if state else None:
                message = f"this is not the state of {name}: {problem}" if key is not None else message
            elif convert:
                return way.run(state)
            else:
                hint += f", or let load_state_dict(..., convert=True) convert it: {way.summary}"
        raise OptimizerError(message, hint=hint)

    def _restored(self, resolved: Resolved, p: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
        executor = engine.choose_executor(resolved, p, self._executor)
        state = {}
        for name, spec in resolved.specs.items():
            device = engine.step_device(p, executor) if spec.host else p.device
            value = torch.as_tensor(saved[name]).detach().to(device=device, dtype=spec.dtype, copy=True)
            state[name] = value.reshape(()) if name == "step" else value
        return state

    def __getstate__(self) -> dict[str, Any]:
        own = {"_settings": self._settings, "_executor": self._executor, "_resolved": self._resolved}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # groups of a foreign checkpoint may lack some
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)


@contextlib.contextmanager
def _no_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """The arithmetic of a step is float32, also where it is called within autocast (backward may be, too)."""
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _check_hyper(group: dict[str, Any]) -> None:
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise OptimizerError(f"a tensor lr has one element, found shape {list(lr.shape)}")
    elif not _number(lr) or lr < 0:
        raise OptimizerError(f"lr should be a number of at least 0, found {lr!r}")
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(_number(b) and 0 <= b < 1 for b in betas):
        raise OptimizerError(f"betas should be two numbers from 0 up to, not including, 1, found {betas!r}")
    if not _number(eps) or eps < 0:
        raise OptimizerError(f"eps should be a number of at least 0, found {eps!r}")
    if not _number(decay) or decay < 0:
        raise OptimizerError(f"weight_decay should be a number of at least 0, found {decay!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
