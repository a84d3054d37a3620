"""Fake CPU tensors with CUDA semantics: what is changed, and that it is all put back."""

from __future__ import annotations

import random
import sys

import pytest
import torch
import torch._dynamo  # torch loads it when it needs it, and attributes of torch change with it
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_attention
from torch.optim import optimizer as optimizer_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memadvise.errors import TargetRaised, UsageError
from memadvise.memory.architecture import device_model
from memadvise.memory.estimate import estimate
from memadvise.memory.session import fake_session
from memadvise.memory.trace import trace_step
from memadvise.plan.schema import Switches
from memadvise.target import Target

_REPLACED = (
    "scaled_dot_product_attention",
    "dropout",
    "rms_norm",
    "softmax.int",
    "log_softmax.int",
    "cross_entropy_loss",
    "exp",
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 32)
        self.attention = nn.MultiheadAttention(32, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1))])
        self.head = nn.Linear(32, 16)

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _target(build_model=Net, **functions):
    return Target(build_model=build_model, build_batches=lambda: [torch.randint(16, (2, 8))], **functions)


def _state_of_torch():
    names = ["torch.nn.init", "torch.cuda", "torch.autograd", "torch.optim.adam", "torch.optim.sgd", "torch"]
    if "transformers.masking_utils" in sys.modules:
        names.append("transformers.masking_utils")
    hooks = nn.modules.module
    return {
        "attributes": {(n, k): v for n in names for k, v in vars(sys.modules[n]).items() if not k.startswith("__")},
        "apply": nn.Module._apply,
        "autocast": torch.amp.autocast_mode.autocast.__init__,
        "rng": torch.get_rng_state,
        "kernels": [torch._C._dispatch_dump(f"aten::{name}") for name in _REPLACED],
        "modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
        "hooks": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "optimizer hooks": len(optimizer_module._global_optimizer_post_hooks),
    }


def _amp_loss(model, batch):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return model(batch)


def _broken_loss(model, batch):
    _amp_loss(model, batch)
    raise ValueError("the user's mistake")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_torch_is_left_as_found(device):
    torch.manual_seed(5)
    random.seed(5)
    before, numbers = _state_of_torch(), (torch.get_rng_state(), random.getstate())
    estimate(_target(compute_loss=_amp_loss), device=device, switches=Switches(checkpoint=("blocks.*",)))
    assert _state_of_torch() == before
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert type(torch.zeros(2)) is torch.Tensor


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_torch_is_left_as_found_after_an_error(device):
    before = _state_of_torch()
    with pytest.raises(TargetRaised, match="the user's mistake") as caught:
        estimate(_target(compute_loss=_broken_loss), device=device)
    assert caught.value.where is not None
    assert caught.value.where.path.endswith("test_semantics.py")
    assert _state_of_torch() == before


def test_an_error_while_building_is_the_targets():
    def build():
        return nn.Linear(2, 2, dtype="no such type")

    before = _state_of_torch()
    with pytest.raises(TargetRaised, match="build_model"):
        estimate(_target(build_model=build))
    assert _state_of_torch() == before


def test_unknown_device():
    with pytest.raises(UsageError, match="'tpu' is not a device"):
        estimate(_target(), device="tpu")


def _kernels(
    dtype=torch.float32,
    *,
    length=8,
    heads=(4, 4),
    head_dim=16,
    mask=None,
    attention=None,
    arch="sm_80",
    forced="auto",
    torch_version=None,
    **options,
):
    """The kernels chosen for one call on the device, its backward pass included."""
    with fake_session(_target(), device_model("cuda", arch=arch, attention=forced, torch=torch_version)) as session:
        q = torch.randn(2, heads[0], length, head_dim, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(2, heads[1], length, head_dim, dtype=dtype) for _ in range(2))
        if mask is not None:
            options["attn_mask"] = torch.ones(length, length, dtype=mask)
        out = (attention or F.scaled_dot_product_attention)(q, k, v, **options)
        assert out.shape == q.shape
        out.sum().backward()
        return dict(session.semantics.attention)


def test_attention_kernels():
    half = torch.bfloat16
    assert _kernels(half) == {"flash": 1}
    assert _kernels(half, is_causal=True, head_dim=20) == {"flash": 1}
    assert _kernels(half, heads=(4, 2), enable_gqa=True) == {"flash": 1}
    assert _kernels(half, attention=imported_attention) == {"flash": 1}
    assert _kernels(half, mask=torch.bool) == {"efficient": 1}
    assert _kernels(half, mask=torch.bfloat16, length=16) == {"efficient": 1}
    assert _kernels() == {"efficient": 1}
    assert _kernels(half, head_dim=264) == {"efficient": 1}
    assert _kernels(heads=(4, 2), enable_gqa=True) == {"math": 1}  # the efficient kernel has no grouped queries
    assert _kernels(torch.float64) == {"math": 1}
    with sdpa_kernel(SDPBackend.MATH):
        assert _kernels(half) == {"math": 1}
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert _kernels(half) == {"efficient": 1}


def test_attention_kernels_by_device():
    """The rules of sdp_utils.cpp, one by one."""
    half = torch.bfloat16
    assert _kernels(half, arch="sm_90") == _kernels(half, arch="sm_100") == {"cudnn": 1}
    assert _kernels(half, arch="sm_90", mask=torch.bool) == {"cudnn": 1}
    assert _kernels(half, arch="sm_90", heads=(4, 2), enable_gqa=True, mask=torch.bool) == {"cudnn": 1}
    assert _kernels(half, arch="sm_90", torch_version="2.10") == {"flash": 1}
    assert _kernels(half, arch="sm_90", dropout_p=0.1) == {"flash": 1}  # cuDNN: multiples of 1/16
    assert _kernels(half, arch="sm_90", dropout_p=0.125) == {"cudnn": 1}
    assert _kernels(half, arch="sm_90", head_dim=136) == {"flash": 1}
    assert _kernels(arch="sm_90") == {"efficient": 1}
    assert _kernels(half, arch="sm_120") == _kernels(half, arch="sm_89") == {"flash": 1}
    assert _kernels(half, arch="sm_89", head_dim=200) == {"efficient": 1}  # too little shared memory for its backward
    assert _kernels(half, arch="sm_80", head_dim=200) == {"flash": 1}
    assert _kernels(half, arch="sm_75") == {"math": 1}
    assert _kernels(torch.float16, arch="sm_75") == {"efficient": 1}
    assert _kernels(half, arch="sm_80", heads=(4, 2), enable_gqa=True, mask=torch.bool) == {"math": 1}
    assert _kernels(torch.float32, torch_version="2.14", heads=(4, 2), enable_gqa=True) == {"efficient": 1}


def test_attention_that_is_asked_for():
    half = torch.bfloat16
    assert _kernels(half, arch="sm_90", forced="flash") == {"flash": 1}
    assert _kernels(half, arch="sm_80", forced="cudnn") == {"cudnn": 1}
    assert _kernels(half, forced="math") == {"math": 1}
    assert _kernels(half, forced="efficient") == {"efficient": 1}
    assert _kernels(torch.float32, forced="flash") == {"efficient": 1}  # flash cannot: the next that can
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert _kernels(half, arch="sm_90") == {"math": 1}


def test_cudnn_is_not_preferred_when_told_so(monkeypatch):
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert _kernels(torch.bfloat16, arch="sm_90") == {"flash": 1}


def test_recomputed_attention_and_dropout_take_the_cuda_way():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.dropout(imported_attention(q, k, v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x.to("cuda"))
            return x.sum()

    target = Target(build_model=lambda: Model().cuda(), build_batches=lambda: [torch.randn(2, 8, 32)])
    trace = trace_step(target, switches=Switches(checkpoint=("blocks.*",)))
    made = {s.op for s in trace.storages if s.recomputed}
    assert "aten._scaled_dot_product_efficient_attention.default" in made
    assert "aten.native_dropout.default" in made


def _live_forward(target):
    """Bytes by operation of what the forward pass keeps for the backward pass."""
    trace = trace_step(target)
    return [(s.op, s.num_bytes) for s in trace.storages if s.phase == "forward"]


def test_dropout_keeps_one_byte_an_element():
    target = Target(
        build_model=lambda: nn.Sequential(nn.Linear(8, 100), nn.Dropout(0.5)),
        build_batches=lambda: [torch.randn(50, 8)],
        compute_loss=lambda model, batch: model(batch).sum(),
    )
    assert ("aten.native_dropout.default", 5000) in _live_forward(target)
    assert any("fused CUDA kernel" in a for a in estimate(target).assumptions)


def test_autocast_takes_effect_with_the_lists_of_cuda():
    def dtypes(device):
        seen = {}
        with fake_session(_target(), device) as session, torch.autocast(device, dtype=torch.bfloat16):
            ids = session.batches[0]
            x = session.model.tokens(ids)
            seen["linear"] = session.model.head(x).dtype
            seen["norm"] = F.layer_norm(x.bfloat16(), (32,)).dtype
            seen["softmax"] = x.bfloat16().softmax(-1).dtype
            seen["loss"] = F.cross_entropy(x.bfloat16().flatten(0, 1), ids.flatten()).dtype
            seen["exp"] = x.bfloat16().exp().dtype
            seen["sum"] = x.bfloat16().sum().dtype
        return seen

    wide, half = torch.float32, torch.bfloat16
    on_cuda = {"linear": half, "norm": wide, "softmax": wide, "loss": wide, "exp": wide, "sum": wide}
    assert dtypes("cuda") == on_cuda
    assert dtypes("cpu") == {**on_cuda, "norm": half, "softmax": half, "exp": half, "sum": half}


def test_softmax_of_half_into_fp32_makes_no_copy():
    with fake_session(_target()):
        x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
        y = F.softmax(x, dim=-1, dtype=torch.float32)
        assert y.dtype is torch.float32
        assert y.grad_fn.name() == "SoftmaxBackward0"
        assert y.grad_fn.next_functions[0][0].name().endswith("AccumulateGrad")
        y.sum().backward()
        assert x.grad.dtype is torch.bfloat16


def test_moving_and_casting_a_model_keeps_ties_and_identity():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.tokens.weight

    with fake_session(_target(build_model=Tied)) as session:
        model = session.model
        weight = model.head.weight
        assert model.cuda().to("cuda:0", dtype=torch.bfloat16).half() is model
        assert model.head.weight is model.tokens.weight is weight
        assert weight.dtype is torch.float16
        assert weight.device.type == "cpu"


def test_cuda_calls_around_a_step_do_nothing():
    def train_step(model, batch, optimizer):
        batch = batch.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        model(batch + torch.zeros(1, dtype=torch.long, device="cuda")).backward()
        torch.cuda.empty_cache()
        optimizer.step()
        optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    assert estimate(_target(train_step=train_step)).peak_bytes > 0


def test_no_weights_are_initialised_or_allocated():
    def build():
        return nn.Linear(200_000, 200_000, bias=False)  # 149 GiB

    with fake_session(Target(build_model=build, build_batches=lambda: [torch.zeros(1)])) as (model, _):
        assert model.weight.numel() * 4 == 160_000_000_000
        assert nn.init.normal_(tensor=model.weight, std=0.02) is model.weight


def test_rms_norm_is_one_kernel_on_cuda():
    def kept(weight_dtype=torch.float32, **assumed):
        """Floats that the forward pass leaves for the backward pass, by operation."""
        target = Target(
            build_model=lambda: nn.RMSNorm(64, dtype=weight_dtype),
            build_batches=lambda: [torch.randn(32, 64)],
            compute_loss=lambda model, batch: model(batch * 2).square().mean(),
        )
        trace = trace_step(target, device=device_model("cuda", **assumed))
        return {s.op for s in trace.storages if s.phase == "forward"}

    assert "aten._fused_rms_norm.default" in kept()
    assert "aten.rsqrt.default" in kept(torch="2.8")
    assert "aten.rsqrt.default" in kept(torch.bfloat16)  # the fused kernel has one dtype
