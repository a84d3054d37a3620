"""A small model with a scalar, a vector, an embedding, matrices and a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memadvise.optim.optimizer import MemadviseOptimizer
from memadvise.plan.schema import Setting


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)

        self.embed = parameter(16, 12)
        self.query = parameter(8, 12)
        self.bias = parameter(8)
        self.conv = parameter(8, 4, 3, 3)
        self.experts = nn.ParameterDict({"w": parameter(8, 5)})
        self.gain = nn.Parameter(torch.tensor(1.25))

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        hidden = self.embed[tokens] @ self.query.t() + self.bias
        features = nn.functional.conv2d(image.to(self.conv.dtype), self.conv).mean((2, 3))
        return torch.tanh(hidden.mean(1) + features) @ self.experts["w"] * self.gain


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    tokens = torch.randint(0, 12, (6, 7), generator=generator)  # tokens 12 to 15 never come: rows of zero gradient
    return tokens, torch.randn(6, 4, 6, 6, generator=generator), torch.randn(6, 5, generator=generator)


def loss_of(model: Toy, number: int) -> Tensor:
    tokens, image, goal = batch(number)
    return (model(tokens, image).float() - goal).square().mean()


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0) -> float:
    loss = torch.zeros(())
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def optimizer_for(model: nn.Module, setting: Setting, lr: float, executor: str | None = None) -> MemadviseOptimizer:
    return MemadviseOptimizer(model.named_parameters(), setting, lr=lr, weight_decay=0.1, executor=executor)
