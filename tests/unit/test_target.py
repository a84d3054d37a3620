from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from memadvise.errors import EnvironmentProblem, TargetError, TargetRaised
from memadvise.target import Target, load_target, require

GOOD = """
import torch
from torch import nn
print("hello from the module")

def build_model():
    print("building")
    return nn.Linear(3, 1)

def build_batches():
    for i in range(3):
        yield torch.full((2, 3), float(i))

def compute_loss(model, batch):
    return model(batch).square().mean()
"""


def write(tmp_path: Path, text: str, name: str = "model.py") -> str:
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_plain_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = load_target(write(tmp_path, GOOD))
    model = target.model()
    assert model.training
    batches = target.batches(5)
    assert [float(b[0, 0]) for b in batches] == [0, 1, 2, 0, 1]  # ends early: repeated from the start
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target.step(model, batches[1], optimizer)
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None
    out, err = capfd.readouterr()
    assert out == ""
    assert "hello from the module" in err
    assert "building" in err
    assert target.sha256() is not None


def test_what_c_code_prints_goes_to_stderr_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_target(write(tmp_path, "import os\nos.write(1, b'from C')\n" + GOOD))
    out, err = capfd.readouterr()
    assert out == ""
    assert "from C" in err


def test_a_named_callable_and_a_named_target(tmp_path: Path) -> None:
    text = GOOD + (
        "import memadvise\n"
        "def make():\n"
        "    return memadvise.Target(build_model, build_batches, compute_loss=compute_loss)\n"
        "ready = make()\n"
    )
    path = write(tmp_path, text)
    for name in ("make", "ready"):
        target = load_target(f"{path}:{name}")
        assert target.spec == f"{path}:{name}"
        assert target.path == Path(path).resolve()
        assert target.loss(target.model(), target.batches(1)[0]).ndim == 0


def test_a_package_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mypkg_for_memadvise"
    package.mkdir()
    (package / "__init__.py").write_text("")
    make = "\ndef make():\n    from memadvise import Target\n    return Target(build_model, build_batches)\n"
    write(package, GOOD + make, "nets.py")
    monkeypatch.chdir(tmp_path)
    assert load_target("mypkg_for_memadvise.nets:make").compute_loss is None


def test_neighbouring_modules_are_importable(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 3", "neighbour_module.py")
    assert load_target(write(tmp_path, "from neighbour_module import WIDTH\n" + GOOD)).model().in_features == 3


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("nowhere.py", TargetError, "there is no file nowhere.py"),
        ("justaname", TargetError, "not a target"),
        ("no_such_pkg.mod:f", TargetError, "no module no_such_pkg.mod"),
        ("os.path:nothing", TargetError, "has no 'nothing'"),
        ("os.path:sep", TargetError, "is str, not a memadvise.Target"),
    ],
)
def test_targets_that_cannot_be_found(spec: str, kind: type[TargetError], says: str) -> None:
    with pytest.raises(kind) as caught:
        load_target(spec)
    assert says in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says", "line", "code"),
    [
        ("def build_model(:\n", "SyntaxError", 1, 3),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere", 1, 3),
        ("x = 1\ny = 1 / 0\n", "ZeroDivisionError", 2, 3),
        ("import sys\nsys.exit(4)\n", "sys.exit(4)", None, 3),
        ("def build_batches(): return []\n", "no function build_model()", 1, 2),
        ("build_model = 3\nbuild_batches = 4\n", "no function build_model()", 1, 2),
        (GOOD + "compute_loss = 4\n", "compute_loss", None, 2),
    ],
)
def test_files_that_do_not_import_or_lack_a_function(
    tmp_path: Path, text: str, says: str, line: int | None, code: int
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert says in str(caught.value)
    assert caught.value.exit_code == code
    if line is not None:
        assert caught.value.where is not None
        assert (caught.value.where.path, caught.value.where.line) == (path, line)


def broken(tmp_path: Path, old: str, new: str) -> Target:
    assert old in GOOD
    return load_target(write(tmp_path, GOOD.replace(old, new)))


def test_a_model_that_raises_names_the_line(tmp_path: Path) -> None:
    target = broken(tmp_path, "return nn.Linear(3, 1)", "return nn.Linear(3, -1)")
    with pytest.raises(TargetRaised, match=r"build_model\(\) of .* raised RuntimeError") as caught:
        target.model()
    assert caught.value.where is not None
    assert caught.value.where.line == 8
    assert "nn.Linear(3, -1)" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "call", "says"),
    [
        ("nn.Linear(3, 1)", "None", "model", "returned NoneType, not a torch.nn.Module"),
        ("nn.Linear(3, 1)", "nn.ReLU()", "model", "no trainable parameter"),
        ("yield torch", "pass; torch", "batches", "returned NoneType, not an iterable"),
        ("for i in range(3):\n        yield", "for i in range(0):\n        yield", "batches", "gave no batch"),
        ("model(batch).square().mean()", "3.0", "loss", "gave float, where a scalar loss is needed"),
        ("model(batch).square().mean()", "model(batch)", "loss", "gave a tensor of shape [2, 1]"),
        ("model(batch).square().mean()", "model(batch).mean().detach()", "loss", "does not depend on any trainable"),
        ("model(batch).square().mean()", "model(batch[:, :2]).mean()", "loss", "shapes cannot be multiplied"),
    ],
)
def test_wrong_returns(tmp_path: Path, old: str, new: str, call: str, says: str) -> None:
    target = broken(tmp_path, old, new)
    calls = {
        "model": target.model,
        "batches": lambda: target.batches(1),
        "loss": lambda: target.loss(target.model(), target.batches(1)[0]),
    }
    with pytest.raises(TargetError) as caught:
        calls[call]()
    assert says in str(caught.value)
    assert caught.value.where is not None


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"loss": scale * (self.w * x).sum(), "logits": x}


@pytest.mark.parametrize("batch", [{"x": torch.ones(2), "scale": 2.0}, (torch.ones(2), 2.0), [torch.ones(2), 2.0]])
def test_the_default_loss_takes_the_output_of_the_model(batch: object) -> None:
    target = Target(build_model=WithLoss, build_batches=lambda: [batch])
    assert target.loss(target.model(), target.batches(1)[0]).item() == 4.0


def test_a_train_step_of_the_users_own_is_used() -> None:
    calls = []

    def train_step(model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        calls.append(batch)
        return 1.5

    target = Target(WithLoss, lambda: [torch.ones(2)], train_step=train_step)
    model = target.model()
    assert target.step(model, torch.ones(2), torch.optim.SGD(model.parameters(), lr=0.1)) == 1.5
    assert len(calls) == 1


def test_out_of_memory_and_interrupts_pass_through(tmp_path: Path) -> None:
    for name, kind in (("MemoryError", MemoryError), ("KeyboardInterrupt", KeyboardInterrupt)):
        target = broken(tmp_path, "return nn.Linear(3, 1)", f"raise {name}()")
        with pytest.raises(kind):
            target.model()


def test_options_are_for_hf_targets_only(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="for hf: targets only"):
        load_target(write(tmp_path, GOOD), options={"dtype": "bfloat16"})


def test_require_names_the_extra() -> None:
    assert require("os", "hf") is os
    with pytest.raises(EnvironmentProblem) as caught:
        require("no_such_module_anywhere", "hf")
    assert "memadvise[hf]" in str(caught.value.hint)


def test_loading_a_target_does_not_leave_the_path_changed(tmp_path: Path) -> None:
    before = list(sys.path)
    load_target(write(tmp_path, GOOD))
    assert sys.path == before


def test_importing_memadvise_does_not_import_torch() -> None:
    code = "import sys, memadvise, memadvise.target, memadvise.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
