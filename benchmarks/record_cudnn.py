"""What cuDNN's convolutions and recurrent layers take on a GPU, beside the rules that the estimate has for them.

    python benchmarks/record_cudnn.py [--write FILE]        on a GPU: measure
    python benchmarks/record_cudnn.py --again FILE          anywhere: a recording against today's rules

Every case runs forward and backward once more after a first time, while torch's allocator keeps its history; what is
allocated and freed within one operation is the workspace, what stays until the backward pass the reserve. The tests
hold the rules against tests/data/cudnn: a recording of the same cases by an earlier form of this script, which took all
gradients in one call (and has no gradient of the input for three channels and fewer). The form here was started on a
GPU once, and had not finished when it was stopped after 100 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_support.output import Rows, machine
from torch import Tensor, nn

from memadvise.memory.architecture import device_model
from memadvise.memory.cudnn_convolution import backward, forward
from memadvise.memory.cudnn_rnn import Call

COLUMNS = ("what", "cases", "median |error| %", "within 5 %", "mean error %")
IMAGES = ((8, 56), (64, 8), (16, 28), (128, 16), (1024, 8), (2, 128))  # batch, height and width
CHANNELS = ((1, 64), (3, 64), (64, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512))
WINDOWS = ((3, 1), (1, 1), (3, 2), (7, 2), (5, 1))  # size, stride
MORE = (
    (8, 3, 224, 768, 16, 16, 0, 1), (128, 1, 8, 768, 2, 2, 0, 1), (64, 1, 8, 512, 2, 2, 0, 1),
    (8, 64, 56, 64, 3, 1, 1, 64),
    (8, 256, 28, 256, 3, 1, 1, 256), (4, 320, 64, 320, 3, 1, 1, 1), (4, 640, 32, 640, 3, 1, 1, 1),
    (4, 1280, 16, 1280, 3, 1, 1, 1),
)  # fmt: skip
SEQUENCES = (
    (32, 16, 512, 512), (32, 16, 64, 64), (16, 16, 512, 512), (64, 16, 512, 512), (32, 32, 512, 512),
    (32, 16, 256, 512), (32, 16, 512, 256), (128, 8, 128, 256), (7, 3, 40, 96), (35, 20, 650, 650),
    (100, 64, 1024, 1024), (1, 16, 512, 512),
)  # fmt: skip  # length, batch, input, hidden
Row = list[Any]


def convolutions() -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """dtype, channels last, and (batch, channels, size, filters, window, stride, padding, groups)."""
    shapes = [
        (n, c, size, k, window, stride, window // 2, 1)
        for (n, size), (c, k), (window, stride) in itertools.product(IMAGES, CHANNELS, WINDOWS)
        if not (window == 7 and c > 3) and not (window == 5 and c > 128) and n * c * size * size <= 3e7
    ]
    for dtype, last in itertools.product(("float32", "bfloat16", "float16"), (False, True)):
        for shape in [*shapes, *MORE][:: 3 if last else 1]:
            yield dtype, last, shape


def recurrent() -> Iterator[tuple[str, int, bool, float, str, tuple[int, int, int, int]]]:
    """kind, layers, both directions, dropout, dtype, and (length, batch, input, hidden)."""
    for kind, layers, both, dropout, dtype in itertools.product(
        ("LSTM", "GRU", "RNN"), (1, 2, 3), (False, True), (0.0, 0.3), ("float32", "bfloat16")
    ):
        if (dropout and layers == 1) or (dtype == "bfloat16" and (both or dropout or layers == 3)):
            continue
        for shape in SEQUENCES:
            yield kind, layers, both, dropout, dtype, shape


def tensors(dtype: str, last: bool, shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output."""
    n, c, size, k, window, stride, padding, groups = shape
    out = (size + 2 * padding - window) // stride + 1
    shapes = ((n, c, size, size), (k, c // groups, window, window), (n, k, out, out))
    layout = torch.channels_last if last else torch.contiguous_format
    made = (torch.zeros(s, dtype=getattr(torch, dtype), device=device).to(memory_format=layout) for s in shapes)
    return next(made), next(made), next(made)


def rule_of_convolution(dtype: str, last: bool, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Workspaces of the output, and of the gradients of the input, and of weight and bias."""
    x, weight, gradient = tensors(dtype, last, shape, "meta")
    *_, k, _, stride, padding, groups = shape
    how = ((stride, stride), (padding, padding), (1, 1), False, (0, 0), groups)
    model = device_model("cuda", arch="sm_90")

    def of(wanted: tuple[bool, bool, bool]) -> int:
        return sum(backward((gradient, x, weight, [k], *how, wanted), {}, model))

    of_input = of((True, False, False))
    of_input += weight.nbytes if of_input else 0  # it is there before the gradient of the weight is
    return sum(forward((x, weight, None, *how), {}, model)), of_input, of((False, True, True))


def rule_of_recurrent(kind: str, layers: int, both: bool, dropout: float, dtype: str, shape: Row) -> tuple[int, int]:
    """Workspace and reserve."""
    length, rows, width, hidden = shape
    itemsize = 4 if dtype == "float32" else 2
    call = Call(
        kind.lower(), layers, 1 + both, length, rows, length * rows, width, hidden, dropout, itemsize
    )  # fmt: skip
    return call.workspace_bytes, call.reserve_bytes


# ---------------------------------------------------------------- on a GPU


def history(run: Callable[[], object]) -> list[tuple[str, int, int]]:
    """(action, address, bytes) of every allocation and free while ``run`` runs."""
    memory: Any = torch.cuda.memory
    torch.cuda.synchronize()
    memory._record_memory_history(max_entries=100_000, context=None)
    try:
        run()
        torch.cuda.synchronize()
        (trace,) = [trace for trace in memory._snapshot()["device_traces"] if trace] or [[]]
    finally:
        memory._record_memory_history(enabled=None)
    return [(e["action"], e["addr"], e["size"]) for e in trace if e["action"] in ("alloc", "free_completed")]


def passing(events: list[tuple[str, int, int]]) -> list[tuple[int, bool]]:
    """(bytes, freed before the next one came) of each allocation."""
    found: list[tuple[int, bool]] = []
    at: dict[int, int] = {}
    for action, address, size in events:
        if action == "alloc":
            at[address] = len(found)
            found.append((size, False))
        elif at.get(address) == len(found) - 1:
            found[-1] = (found[-1][0], True)
    return found


def measure_convolution(dtype: str, last: bool, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """As :func:`rule_of_convolution`."""
    x, weight, gradient = tensors(dtype, last, shape, "cuda")
    bias = torch.zeros(shape[3], dtype=x.dtype, device="cuda")
    *_, stride, padding, groups = shape
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [nn.functional.conv2d(*inputs, stride, padding, 1, groups)]

    def most(wanted: list[Tensor]) -> int:
        events = history(lambda: torch.autograd.grad(kept[0], wanted, gradient, retain_graph=True))
        results = {t.nbytes for t in wanted}
        return max((size for size, passed in passing(events) if passed and size not in results), default=0)

    run()
    torch.autograd.grad(kept[0], inputs, gradient, retain_graph=True)
    forwards = [size for size, passed in passing(history(run)) if passed and size != gradient.nbytes]
    return max(forwards, default=0), most([inputs[0]]), most(inputs[1:])


def measure_recurrent(kind: str, layers: int, both: bool, dropout: float, dtype: str, shape: Row) -> tuple[int, int]:
    """As :func:`rule_of_recurrent`."""
    length, rows, width, hidden = shape
    module = getattr(nn, kind)(width, hidden, layers, dropout=dropout, bidirectional=both)
    module = module.cuda().to(getattr(torch, dtype))
    x = torch.zeros(length, rows, width, dtype=getattr(torch, dtype), device="cuda", requires_grad=True)
    kept = [module(x)[0]]

    def run() -> None:
        kept[:] = [module(x)[0]]

    sizes = [size for action, _, size in history(run) if action == "alloc"]
    return sizes[-2], sizes[-1]  # the last two of the call


def measured() -> dict[str, Any]:
    """A recording."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "convolutions": [[*case, *measure_convolution(*case)] for case in convolutions()],
        "recurrent": [[*case, *measure_recurrent(*case)] for case in recurrent()],
    }


def errors(recording: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """By what it is, the rule's error: of convolutions in parts of input, weight and output together, of recurrent
    layers in parts of what was measured.
    """
    groups: dict[str, list[float]] = {}
    for dtype, last, shape, *sizes in recording["convolutions"]:
        total = sum(t.nbytes for t in tensors(dtype, last, shape, "meta"))
        rules = rule_of_convolution(dtype, last, shape)
        for name, size, rule in zip(("output", "of input", "of weight, bias"), sizes, rules, strict=True):
            if size is None:  # not measured
                continue
            layout = "channels last" if last else "contiguous"
            groups.setdefault(f"convolution {dtype}, {layout}: {name}", []).append((rule - size) / total)
    for kind, layers, both, dropout, dtype, shape, *sizes in recording["recurrent"]:
        rules_of = rule_of_recurrent(kind, layers, both, dropout, dtype, shape)
        for name, size, rule in zip(("workspace", "reserve"), sizes, rules_of, strict=True):
            groups.setdefault(f"{kind}: {name}", []).append(rule / size - 1)
    yield from groups.items()


def main() -> None:
    parser = argparse.ArgumentParser(description="cuDNN's workspaces against the rules of the estimate.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the recording there")
    parser.add_argument("--again", type=Path, metavar="FILE", help="measure nothing: a recording against the rules")
    options = parser.parse_args()
    print(machine(), end="\n\n")
    if options.again:
        recording = json.loads(options.again.read_text(encoding="utf-8"))
    elif not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device")
        return
    else:
        recording = measured()
    print(f"measured on {recording['device']}, torch {recording['torch']}, cuDNN {recording['cudnn']}", end="\n\n")
    if options.write:
        rows = {key: value for key, value in recording.items() if not isinstance(value, list)}
        lists = {key: value for key, value in recording.items() if isinstance(value, list)}
        text = json.dumps(rows, indent=1)[:-2]  # a line for each case
        for key, cases in lists.items():
            text += f',\n "{key}": [\n  ' + ",\n  ".join(map(json.dumps, cases)) + "\n ]"
        options.write.write_text(text + "\n}\n", encoding="utf-8")
    table = Rows(COLUMNS, (50, 5))
    table.start()
    for name, found in errors(recording):
        sizes = sorted(map(abs, found))
        close = 100 * sum(size <= 0.05 for size in sizes) / len(sizes)
        table.add([name, len(found), 100 * statistics.median(sizes), f"{close:.0f} %", 100 * statistics.mean(found)])


if __name__ == "__main__":
    main()
