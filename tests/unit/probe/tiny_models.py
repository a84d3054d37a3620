"""Small real models and targets for the probe's tests."""

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from memadvise.ledger import Parameter
from memadvise.plan.schema import Setting
from memadvise.probe.runner import run_probe
from memadvise.target import Target

WIDTH, HEADS, VOCABULARY, CONTEXT = 16, 4, 8, 12


class TinyTransformer(nn.Module):
    """One pre-norm block with separate q, k, v, o: tokens [batch, time] -> logits [batch, time, vocabulary]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, time = tokens.shape
        x = self.tokens(tokens) + self.positions.weight[:time]
        h = self.norms[0](x)
        q, k, v = (f(h).view(batch, time, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, time, WIDTH))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))
        return self.head(self.norms[2](x))


ROLES = {
    "tokens.weight": "token_embedding", "positions.weight": "position_embedding", "query.weight": "attention_query",
    "key.weight": "attention_key", "value.weight": "attention_value", "output.weight": "attention_output",
    "up.weight": "mlp_up", "down.weight": "mlp_down", "head.weight": "head",
}  # fmt: skip


def describe(model: nn.Module, roles: dict[str, str] | None = None) -> tuple[Parameter, ...]:
    """Ledger records of every parameter, with roles from a table."""
    roles = ROLES if roles is None else roles
    found = []
    for name, p in model.named_parameters():
        role = roles.get(name, "vector" if p.ndim < 2 else "linear")
        found.append(
            Parameter(
                name=name,
                shape=tuple(p.shape),
                dtype=str(p.dtype).removeprefix("torch."),
                num_bytes=p.numel() * p.element_size(),
                trainable=p.requires_grad,
                role=role,
                module=name.rpartition(".")[0],
                module_type="Linear",
                fan_in=tuple(range(1, p.ndim)) if p.ndim > 1 else (),
                fan_out=(0,) if p.ndim > 1 else (),
                heads=HEADS if role.startswith("attention") else None,
            )
        )
    return tuple(found)


def language_batches(count: int, batch_size: int = 8, seed: int = 0) -> list[torch.Tensor]:
    """Sequences whose next token depends on the last two: something attention has to learn."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        columns = list(torch.randint(0, VOCABULARY, (2, batch_size), generator=generator))
        for _ in range(CONTEXT - 1):
            noise = torch.rand(batch_size, generator=generator) < 0.1
            following = (3 * columns[-1] + columns[-2] + 1) % VOCABULARY
            random = torch.randint(0, VOCABULARY, (batch_size,), generator=generator)
            columns.append(torch.where(noise, random, following))
        batches.append(torch.stack(columns, 1))
    return batches


def language_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def language_target(dropout: float = 0.0, num_batches: int = 20, **changes) -> Target:
    return Target(
        **{
            "build_model": lambda: TinyTransformer(dropout),
            "build_batches": lambda: language_batches(num_batches),
            "compute_loss": language_loss,
            **changes,
        }
    )


def trained_transformer(num_steps: int = 100, dtype: torch.dtype = torch.float64) -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in itertools.islice(itertools.cycle(language_batches(20)), num_steps):
        loss = language_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def exact_hessian(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[n, n]`` Hessian of ``loss`` in the entries of ``weight``, row by row."""
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [torch.autograd.grad(g, weight, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    return torch.stack(rows)


ADAMW, ROWS, COLUMNS, WHOLE = Setting("adamw"), *(Setting("slimadam", {"axes": a}) for a in ([1], [0], [0, 1]))
CANDIDATES = (ADAMW, ROWS, COLUMNS, WHOLE)


def probe(target, parameters=None, *, settings=CANDIDATES, **options):
    """A short probe with a few candidates for every matrix, never made longer."""
    if parameters is None:
        parameters = describe(target.model())
    options = {"num_steps": 20, "optimizer_steps": 4, "methods": (), "hessian": False, "extensions": 0, **options}
    return run_probe(
        target, parameters, settings={p.name: settings for p in parameters if len(p.shape) == 2}, **options
    )


def by_name(result):
    return {p.name: p for p in result.parameters}


def without_times(result):
    return dataclasses.replace(result, runs=tuple(dataclasses.replace(r, step_seconds=None) for r in result.runs))
