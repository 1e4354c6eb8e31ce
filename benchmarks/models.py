"""The networks whose training steps are timed: ``make(name)`` gives a model, and what its loss is on a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# Is given the model itself, or what it is wrapped in.
Loss = Callable[[nn.Module], torch.Tensor]


def make(name: str, rank: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    build = {
        "cnn": _cnn,
        "resnet-50": _resnet,
        "transformer": _transformer,
        "recommender": _recommender,
        "wide": _wide,
    }[name]
    return build(torch.Generator().manual_seed(rank))


def _cnn(generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """0.2 million parameters; a batch of 32 images of 28 x 28."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    images, labels = torch.randn(32, 1, 28, 28, generator=generator), torch.randint(10, (32,), generator=generator)
    return model, lambda model: functional.cross_entropy(model(images), labels)


def _wide(generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """4.2 million parameters in four layers; a batch of 8, so that nearly all of a step is communication."""
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])
    inputs, targets = torch.randn(2, 8, 1024, generator=generator)
    return model, lambda model: functional.mse_loss(model(inputs), targets)


class _Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        if inside == outside and stride == 1:
            self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def _resnet(generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """ResNet-50, 25.6 million parameters; a batch of 4 images of 224 x 224."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(_Bottleneck(inside, width, stride if block == 0 else 1))
            inside = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))
    images, labels = torch.randn(4, 3, 224, 224, generator=generator), torch.randint(1000, (4,), generator=generator)
    return model, lambda model: functional.cross_entropy(model(images), labels)


def _transformer(generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """10 million parameters: 6 layers of width 320 over 4,096 words; a batch of 8 x 64 of them."""
    words, width = 4096, 320
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(words, width), nn.TransformerEncoder(layer, 6), nn.Linear(width, words))
    text = torch.randint(words, (8, 65), generator=generator)
    return model, lambda model: functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


class _Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(100_000, 16, sparse=True) for _ in range(8))
        self.top = nn.Sequential(
            nn.Linear(8 * 16 + 13, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        looked_up = [table(column) for table, column in zip(self.tables, sparse.T, strict=True)]
        return self.top(torch.cat([dense, *looked_up], 1))[:, 0]


def _recommender(generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """12.8 million parameters in 8 embedding tables, of which a batch of 512 touches few; 50,000 others."""
    model = _Recommender()
    dense, sparse = torch.randn(512, 13, generator=generator), torch.randint(100_000, (512, 8), generator=generator)
    labels = torch.randint(2, (512,), generator=generator).float()
    return model, lambda model: functional.binary_cross_entropy_with_logits(model(dense, sparse), labels)
