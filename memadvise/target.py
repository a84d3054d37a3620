"""The target: the user's model, batches and loss, and how to load them from a file, a package or an HF config.

A target is user code and is executed. What it prints goes to stderr; what it raises becomes a :class:`TargetRaised`
that names the file and line. Nothing else is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memadvise.batches import SIZES, with_sizes
from memadvise.errors import EnvironmentProblem, Mark, MemadviseError, TargetError, TargetRaised

if TYPE_CHECKING:
    import torch

STUB_HINT = "write a commented starting point with: memadvise init model.py"
_NO_CUDA = (
    *("not compiled with CUDA", "requires CUDA", "without CUDA support", "CUDA generator", "No CUDA GPUs"),
    "not linked with support for cuda",
)
_CUDA_HINT = (
    "it asks for CUDA, and here is none: a trace for --device cuda stands in for it, --device cpu and the probe do "
    "not; leave the device to memadvise, or ask torch.cuda.is_available()"
)
_FUNCTIONS = ("build_model", "build_batches", "compute_loss", "train_step", "validation_loss")


@dataclass(frozen=True)
class Target:
    """What memadvise needs to know of a training run.

    Args:
        build_model: returns a fresh ``torch.nn.Module``; seeds itself if it wants reproducible weights.
        build_batches: returns an iterable of batches: a tensor, or a tuple, list or dict of tensors.
        compute_loss: ``(model, batch) -> scalar tensor``. Default: call the model with the batch (a dict as
            keywords, a tuple or list as arguments) and take the output's ``.loss``, or the output itself if scalar.
        train_step: ``(model, batch, optimizer) -> anything``: one whole step of the user's own, with backward,
            ``optimizer.step()`` and ``optimizer.zero_grad()``. Default: loss, backward, step, zero_grad.
        validation_loss: ``(model) -> number``, of a trained model on data it was not trained on; called in evaluation
            mode without gradients. Default: runs are compared by their last training losses.
        spec: how the user named the target, for messages and the scan file.
        path: the file behind it, if there is one.
        assumptions: what was changed of the user's own, to be said with every number.

    A ``build_batches`` with keywords ``batch_size`` or ``seq_len`` (which have defaults) is asked for other sizes by
    them; see :mod:`memadvise.batches` for what happens without.
    """

    build_model: Callable[[], torch.nn.Module]
    build_batches: Callable[[], Iterable[Any]]
    compute_loss: Callable[[Any, Any], torch.Tensor] | None = None
    train_step: Callable[[Any, Any, Any], Any] | None = None
    validation_loss: Callable[[Any], Any] | None = None
    spec: str = "<target>"
    path: Path | None = None
    assumptions: tuple[str, ...] = ()

    def sized(self, **sizes: int) -> Target:
        """The same target with batches of another ``batch_size`` or ``seq_len``.

        Raises:
            TargetError: a ``seq_len``, and ``build_batches`` has no such keyword.
        """
        build_batches, assumed = with_sizes(self.build_batches, sizes, self.spec)
        return replace(self, build_batches=build_batches, assumptions=(*self.assumptions, *assumed))

    def model(self) -> torch.nn.Module:
        """Build the model, in training mode.

        Raises:
            TargetRaised: the user's code raised.
            TargetError: the result is no module, or has no trainable parameter.
        """
        import torch

        with self._user_code("build_model()"):
            model = self.build_model()
        if not isinstance(model, torch.nn.Module):
            raise TargetError(
                f"build_model() of {self.spec} returned {_kind(model)}, not a torch.nn.Module",
                where=self._mark("build_model"),
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise TargetError(
                f"the model of {self.spec} has no trainable parameter",
                where=self._mark("build_model"),
                hint="at least one parameter needs requires_grad=True",
            )
        return model.train()

    def batches(self, count: int) -> list[Any]:
        """The first ``count`` batches; when the iterable ends earlier, they are repeated from the start.

        Raises:
            TargetRaised: the user's code raised. TargetError: not iterable, or empty.
        """
        with self._user_code("build_batches()"):
            source = self.build_batches()
            if not isinstance(source, Iterable) or isinstance(source, Mapping | str | bytes) or _is_tensor(source):
                raise TargetError(
                    f"build_batches() of {self.spec} returned {_kind(source)}, not an iterable of batches",
                    where=self._mark("build_batches"),
                    hint="return a list, a generator or a DataLoader; a single batch goes into a list",
                )
            first = list(itertools.islice(iter(source), count))
        if not first:
            raise TargetError(
                f"build_batches() of {self.spec} gave no batch",
                where=self._mark("build_batches"),
                hint="yield at least one batch",
            )
        return [first[i % len(first)] for i in range(count)]

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The scalar loss of one batch.

        Raises:
            TargetRaised: the user's code raised, as when a batch does not fit the model.
            TargetError: the result is not a scalar tensor that requires a gradient.
        """
        import torch

        with self._user_code("compute_loss(model, batch)" if self.compute_loss else "model(batch)"):
            output = self.compute_loss(model, batch) if self.compute_loss else _call_model(model, batch)
        loss = output
        if self.compute_loss is None and not (isinstance(output, torch.Tensor) and output.ndim == 0):
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = "compute_loss(model, batch)" if self.compute_loss else "model(batch)"
            raise TargetError(
                f"{what} of {self.spec} gave {_kind(output)}, where a scalar loss is needed",
                where=self._mark("compute_loss"),
                hint="return one scalar tensor from compute_loss(model, batch), or a model output with .loss",
            )
        if not loss.requires_grad:
            raise TargetError(
                f"the loss of {self.spec} does not depend on any trainable parameter",
                where=self._mark("compute_loss"),
                hint="compute it without torch.no_grad() and without .detach() or .item()",
            )
        return loss.reshape(())

    def held_out_loss(self, model: Any) -> float | None:
        """The target's own ``validation_loss``; None if it has none. The model is in training mode again afterwards.

        Raises:
            TargetRaised: the user's code raised. TargetError: it returned no number.
        """
        import torch

        if self.validation_loss is None:
            return None
        with self._user_code("validation_loss(model)", self._mark("validation_loss")), torch.no_grad():
            value = self.validation_loss(model.eval())
        model.train()
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, int | float):
            raise TargetError(
                f"validation_loss(model) of {self.spec} gave {_kind(value)}, where a number is needed",
                where=self._mark("validation_loss"),
            )
        return float(value)

    def step(self, model: Any, batch: Any, optimizer: Any) -> torch.Tensor | float | None:
        """One whole training step.

        Returns:
            The loss, not read on the host (a trace cannot read it); None if the user's own ``train_step`` gives none.
        """
        import torch

        if self.train_step is not None:
            with self._user_code("train_step(model, batch, optimizer)", self._mark("train_step")):
                result = self.train_step(model, batch, optimizer)
            if isinstance(result, torch.Tensor):
                return result.detach() if result.numel() == 1 else None
            return result if isinstance(result, float) else None
        loss = self.loss(model, batch)
        with self._user_code("the backward pass"):
            loss.backward()
        value = loss.detach()
        del loss
        self.optimizer_step(model, optimizer)
        return value

    def optimizer_step(self, model: Any, optimizer: Any) -> None:
        """``optimizer.step()``, then the gradients go.

        Raises:
            TargetError: a gradient is sparse, which no optimizer here takes.
        """
        import torch

        try:
            optimizer.step()
        except (RuntimeError, MemadviseError) as error:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise TargetError(
                        f"the gradient of {name} in {self.spec} is sparse; AdamW and memadvise need dense ones",
                        hint="leave sparse=True out of the nn.Embedding or EmbeddingBag that owns it",
                    ) from error
            raise
        optimizer.zero_grad(set_to_none=True)

    def sha256(self) -> str | None:
        """Hash of the target's source file, None if it has none."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path and self.path.is_file() else None

    def _mark(self, name: str) -> Mark | None:
        function = getattr(self, name)
        code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
        if code is None or self.path is None or Path(code.co_filename) != self.path:
            return None
        return Mark(str(self.path), code.co_firstlineno)

    @contextlib.contextmanager
    def _user_code(self, what: str, called: Mark | None = None) -> Iterator[None]:
        with user_code(f"{what} of {self.spec}", self.path, called):
            yield


@contextlib.contextmanager
def user_code(what: str, path: Path | None = None, called: Mark | None = None) -> Iterator[None]:
    """Run user code: file descriptor 1 and ``sys.stdout`` go to stderr, exceptions become :class:`TargetRaised`.

    A place in the user's file (``path``) is named; ``called`` where the call itself failed, as with missing arguments.
    MemoryError and torch's out-of-memory error pass through, so that a probe can degrade; so does KeyboardInterrupt.
    """
    with stdout_to_stderr():
        try:
            yield
        except (MemadviseError, MemoryError):
            raise
        except SystemExit as error:
            raise TargetRaised(
                f"{what} called sys.exit({error.code})", hint="guard scripts with if __name__ == '__main__'"
            ) from error
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                raise
            message = f"{what} raised {type(error).__name__}: {str(error).strip() or '(no message)'}"
            hint = _CUDA_HINT if any(words in str(error) for words in _NO_CUDA) else None
            raise TargetRaised(message, where=_where(error, path) or called, hint=hint) from error


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever is printed inside, by Python or by C code, goes to stderr, so that stdout holds results only."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            sys.__stdout__.flush() if sys.__stdout__ else None
            saved = os.dup(1)
        except OSError:  # no usable descriptor 1 (closed by the caller): nothing to protect
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def _where(error: BaseException, path: Path | None) -> Mark | None:
    """The innermost frame in the user's file, else the innermost frame outside installed packages."""
    if isinstance(error, SyntaxError) and error.filename:
        return Mark(error.filename, error.lineno or 1, error.offset or 1, (error.text or "").rstrip("\n"))
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if path is not None and f.filename == str(path)]
    other = [f for f in frames if "site-packages" not in f.filename and f"{os.sep}memadvise{os.sep}" not in f.filename]
    for frame in reversed(mine or other):
        return Mark(
            frame.filename, frame.lineno or 1, None, linecache.getline(frame.filename, frame.lineno or 1).rstrip()
        )
    return None


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    name = "a tensor" if _is_tensor(value) else type(value).__name__  # under a trace its class is FakeTensor
    return f"{name} of shape {list(shape)}" if shape is not None else name


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _call_model(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


# ---------------------------------------------------------------- loading


def load_target(spec: str, *, options: Mapping[str, Any] | None = None) -> Target:
    """Load ``file.py``, ``file.py:name``, ``package.module:name`` or ``hf:DIR_OR_CONFIG_JSON``.

    A plain file offers functions ``build_model()``, ``build_batches()`` and optionally ``compute_loss``, ``train_step``
    and ``validation_loss``; a ``name`` is a Target or a callable that returns one. Of ``options``, ``batch_size`` and
    ``seq_len`` ask for batches of other sizes (:meth:`Target.sized`); ``dtype`` is for ``hf:`` targets.

    Raises:
        TargetError: it cannot be found or lacks something. TargetRaised: its code raised.
    """
    if spec.startswith("hf:"):
        from memadvise.hf_target import hf_target

        return hf_target(spec, **dict(options or {}))
    sizes = dict(options or {})
    if others := sorted(sizes.keys() - set(SIZES)):
        raise TargetError(
            f"{', '.join(others)}: for hf: targets only", hint=f"{spec} builds its own model; change it there"
        )
    target = _load_python(spec)
    return target.sized(**sizes) if sizes else target


def _load_python(spec: str) -> Target:
    path: Path | None
    location, _, name = spec.partition(":")
    if location.endswith(".py") or os.sep in location:
        path = Path(location).resolve()
        if not path.is_file():
            raise TargetError(f"there is no file {location}", hint=f"give the path of a Python file; {STUB_HINT}")
        module = _import_file(path, spec)
    elif name:
        module = _import_module(location, spec)
        file = getattr(module, "__file__", None)
        path = Path(file).resolve() if file else None
    else:
        raise TargetError(
            f"'{spec}' is not a target",
            hint="give file.py, file.py:name, package.module:name or hf:DIR_OR_CONFIG_JSON",
        )
    return _from_name(module, name, spec, path) if name else _from_functions(module, spec, path)


def _import_file(path: Path, spec: str) -> Any:
    name = f"_memadvise_target_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise TargetError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    sys.path.insert(0, str(path.parent))  # as `python file.py` does
    try:
        with user_code(f"importing {spec}", path):
            module_spec.loader.exec_module(module)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module


def _import_module(name: str, spec: str) -> Any:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        with user_code(f"importing {spec}"):
            return importlib.import_module(name)
    except TargetRaised as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and (name + ".").startswith(cause.name + "."):
            raise TargetError(
                f"there is no module {name} to import for {spec}",
                hint="check the name, or run from the folder that holds it",
            ) from error
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())


def _from_functions(module: Any, spec: str, path: Path | None) -> Target:
    found: dict[str, Any] = {name: getattr(module, name, None) for name in _FUNCTIONS}
    for name in ("build_model", "build_batches"):
        if not callable(found[name]):
            raise TargetError(
                f"{spec} has no function {name}()", where=Mark(str(path), 1) if path else None, hint=STUB_HINT
            )
    for name in ("compute_loss", "train_step", "validation_loss"):
        if found[name] is not None and not callable(found[name]):
            raise TargetError(f"{name} in {spec} is {_kind(found[name])}, not a function")
    return Target(**found, spec=spec, path=path)


def _from_name(module: Any, name: str, spec: str, path: Path | None) -> Target:
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise TargetError(
            f"{spec.partition(':')[0]} has no '{name}'", hint="name a Target or a callable that returns one"
        )
    if callable(value) and not isinstance(value, Target):
        with user_code(f"{name}() of {spec}", path):
            value = value()
    if not isinstance(value, Target):
        raise TargetError(
            f"{spec} is {_kind(value)}, not a memadvise.Target",
            hint="return memadvise.Target(build_model=..., build_batches=...)",
        )
    return replace(value, spec=spec, path=path)


def require(module: str, extra: str) -> Any:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(f"{module} is not installed", hint=f"pip install 'memadvise[{extra}]'") from error
