import pytest
import torch

from memadvise.ledger import Parameter
from memadvise.optim.create import create_optimizer
from memadvise.optim.registry import approximate_second_moment, problems_of, state_bytes
from memadvise.plan.schema import Setting
from memadvise.probe.fidelity import WINDOW
from memadvise.probe.shadow import TensorShadows, bytes_needed, watched
from memadvise.probe.training import Moments

BETAS, EPS = (0.9, 0.95), 1e-8
ADAMW, ROWS = Setting("adamw"), Setting("slimadam", {"axes": [1]})
INT8 = Setting("adamw", {"first_moment": "int8", "second_moment": "int8"})
TIER_ONE = (
    INT8,
    Setting("adamw", {"first_moment": "dynamic8", "second_moment": "dynamic8"}),
    Setting("adamw", {"first_moment": "int4", "second_moment": "int4"}),
    ROWS,
    Setting("slimadam", {"axes": [0, 1]}),
    Setting("slimadam", {"axes": [1], "first_moment": "int8"}),
    Setting("adam_mini", {"partition": "head", "heads": 4}),
    Setting("adafactor", {"momentum": 0.9}),
    Setting("adapprox", {"rank": 4, "adam": True, "refresh_every": 4, "warm_start": True}),
)
TIER_TWO = (
    Setting("apollo", {"rank": 4, "scale": 1.0}),
    Setting("apollo_mini"),
    Setting("adafactor"),
    Setting("lion"),
    Setting("micro_adam"),
    Setting("galore"),
)
EVERY = (ADAMW, *TIER_ONE, *TIER_TWO)


def parameter(shape=(16, 12), role="linear", name="w"):
    size = 4 * shape[0] * shape[1]
    return Parameter(name, shape, "float32", size, True, role, "m", "Linear", fan_in=(1,), fan_out=(0,))


def gradients(count, shape=(16, 12), seed=0):
    """With a direction that lasts, rows and columns of different size: something for every method to get wrong."""
    generator = torch.Generator().manual_seed(seed)
    lasting, scale = torch.randn(shape, generator=generator), torch.logspace(-2, 0, shape[0]).unsqueeze(1)
    return [scale * (0.3 * lasting + torch.randn(shape, generator=generator)) * 1e-2 for _ in range(count)]


def watch(settings, stream, *, record=(), start=None):
    """Train one weight with torch's AdamW on given gradients, its shadows beside it."""
    record_of = parameter(tuple(stream[0].shape))
    weight = torch.nn.Parameter(torch.zeros(stream[0].shape))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=BETAS, eps=EPS)
    moments = Moments(optimizer)
    shadows = None
    if start is not None:
        optimizer.state[weight] = {
            "step": torch.tensor(float(start[2])), "exp_avg": start[0].clone(), "exp_avg_sq": start[1].clone(),
        }  # fmt: skip
        shadows = TensorShadows(record_of, settings, BETAS, EPS, start[1], moment=start)
    for step, g in enumerate(stream):
        weight.grad = g.clone()
        optimizer.step()
        shadows = shadows or TensorShadows(record_of, settings, BETAS, EPS, g)
        place = step - len(stream) % WINDOW
        begin, end = place >= 0 and place % WINDOW == 0, place >= 0 and place % WINDOW == WINDOW - 1
        shadows.step(weight.grad, moments.of(weight), step, record=step in record, begin=begin, end=end)
        assert torch.equal(weight.grad, g)  # nothing that is watched is changed
    return shadows, moments.of(weight), weight


@pytest.mark.parametrize("setting", [*TIER_ONE, *TIER_TWO], ids=lambda s: s.key)
def test_a_shadow_is_the_optimizer_itself(setting):
    """Its update at a step is what the bundled optimizer does to weights with the same gradients, learning rate 1."""
    stream = gradients(6)
    shadows, *_ = watch((setting,), stream, record=(5,))
    weight = torch.nn.Parameter(torch.zeros(16, 12))
    module = torch.nn.ParameterDict({"w": weight})
    optimizer = create_optimizer(module, setting, lr=1.0, betas=BETAS, eps=EPS, executor="chunked")
    for g in stream:
        before = weight.detach().clone()
        weight.grad = g.clone()
        optimizer.step()
    update = before - weight.detach()
    (shadow,) = shadows.shadows
    for name, tensor in optimizer.state[weight].items():
        torch.testing.assert_close(shadow.state[name], tensor, rtol=0, atol=0)
    squares = shadow.scores.steps[0][1][2]
    assert squares == pytest.approx(update.double().square().sum().item(), rel=1e-4)


def test_means_agree_with_the_average_of_the_dense_moment():
    """The moving average of a mean is the mean of the moving average: an oracle that needs no shadow."""
    stream = gradients(20)
    settings = [s for s in TIER_ONE if s.method in ("slimadam", "adam_mini") and "first_moment" not in s.options]
    shadows, (m, v, step), _ = watch(settings, stream, record=(19,))
    m_hat, v_hat = m.double() / (1 - BETAS[0] ** step), v.double() / (1 - BETAS[1] ** step)
    u = m_hat / (v_hat.sqrt() + EPS)
    for value, setting in zip(shadows.values(), settings, strict=True):
        held = approximate_second_moment(setting, v).double() / (1 - BETAS[1] ** step)
        other = m_hat / (held.sqrt() + EPS)
        assert value.abs_d1 == pytest.approx((0.5 * (other - u).square() * v_hat.sqrt()).sum().item(), rel=1e-4)


def test_eight_bits_turn_the_update_by_nothing_and_the_rest_by_more():
    shadows, *_ = watch(EVERY, gradients(40), record=(30, 36))
    values = {v.candidate: v for v in shadows.values()}
    assert values.keys() == {s.key for s in (*TIER_ONE, *TIER_TWO)}
    assert 0 < values[INT8.key].one_minus_cos < 2e-3
    assert values[INT8.key].abs_d1 < 0.1 * values[ROWS.key].abs_d1
    assert all(0 < v.abs_d1 < float("inf") for v in values.values())


def test_displacement_is_measured_of_what_drops_the_momentum():
    stream = gradients(WINDOW + 5)
    shadows, *_ = watch(EVERY, stream, record=(20,))
    values = {v.candidate: v for v in shadows.values()}
    for setting in TIER_ONE:
        assert values[setting.key].abs_d24 is None
    for setting in TIER_TWO:
        value = values[setting.key]
        assert value.abs_d24 > 0
        assert value.lr_multiplier == pytest.approx(1 / value.displacement_ratio)
    # The window's sum of Lion's updates, written out.
    m, total, reference = torch.zeros(16, 12), 0.0, 0.0
    am, av = torch.zeros(16, 12), torch.zeros(16, 12)
    for step, g in enumerate(stream, start=1):
        if step > 5:
            total = total + torch.lerp(m, g, 1 - BETAS[0]).sign()
        m = torch.lerp(m, g, 1 - BETAS[1])
        am, av = torch.lerp(am, g, 1 - BETAS[0]), torch.lerp(av, g * g, 1 - BETAS[1])
        if step > 5:
            reference = reference + am / (1 - BETAS[0] ** step) / ((av / (1 - BETAS[1] ** step)).sqrt() + EPS)
    ratio = (total.norm() / reference.norm()).item()
    assert values["lion"].displacement_ratio == pytest.approx(ratio, rel=1e-4)


def test_bytes_are_known_before_and_are_those_held():
    p = parameter()
    need = bytes_needed(p, EVERY)
    shadows, *_ = watch(EVERY, gradients(2))
    assert shadows.nbytes == need.held_bytes
    states = sum(state_bytes(s, p.shape) for s in (*TIER_ONE, *TIER_TWO))
    assert need.held_bytes == states + 4 * 16 * 12 * (len(TIER_TWO) + 1)
    shadows.shed()
    assert shadows.nbytes == 0


def test_adamw_and_rates_that_look_at_weights_need_no_shadow():
    assert watched((ADAMW, ROWS, Setting("adafactor", {"step_size": "relative"}))) == (ROWS,)


# ---------------------------------------------------------------- from a checkpoint


@pytest.mark.parametrize("setting", TIER_ONE, ids=lambda s: s.key)
def test_live_moments_are_compressed_into_a_shadow(setting):
    """Started in the middle from AdamW's moments, a shadow does what one does that was there from the start."""
    stream = gradients(60)
    whole, *_ = watch((setting,), stream, record=(59,))
    _, moment, _ = watch((setting,), stream[:40])
    late, *_ = watch((setting,), stream[40:], record=(19,), start=moment)
    assert not late.cold()
    (a,), (b,) = whole.values(), late.values()
    assert b.abs_d1 == pytest.approx(a.abs_d1, rel=0.5 if "first_moment" in setting.options else 0.35)
    assert b.one_minus_cos < 0.01 or setting != INT8


def test_a_zero_start_in_mid_training_would_lie():
    """The trap that copying avoids: rows remember early large gradients."""
    stream = [100 * g for g in gradients(3)] + gradients(37, seed=1)
    _, moment, _ = watch((INT8,), stream[:20])
    warm, *_ = watch((INT8,), stream[20:], record=(10,), start=moment)
    zeros = (torch.zeros_like(moment[0]), torch.zeros_like(moment[1]), 0)
    cold = TensorShadows(parameter(), (INT8,), BETAS, EPS, moment[1], moment=zeros)
    m, v, step = (moment[0].clone(), moment[1].clone(), moment[2])
    for number, g in enumerate(stream[20:31]):
        m, v, step = torch.lerp(m, g, 1 - BETAS[0]), torch.lerp(v, g * g, 1 - BETAS[1]), step + 1
        cold.step(g, (m, v, step), number, record=number == 10, begin=False, end=False)
    assert warm.values()[0].one_minus_cos < 0.01 < cold.values()[0].one_minus_cos


def test_what_keeps_another_quantity_starts_empty_and_is_named():
    _, moment, _ = watch((ROWS,), gradients(10))
    shadows, *_ = watch(EVERY, gradients(2), start=moment)
    assert set(shadows.cold()) == {s.key for s in TIER_TWO} - {"lion", "adafactor"}
    assert all(not problems_of(s, (16, 12), name="w") for s in EVERY)
