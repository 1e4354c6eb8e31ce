"""Images classified by ResNet-50 (section 4.2 of the paper), or by a small network, with PyTorch.

    horovodrun --gloo -np 2 python examples/image_classification.py
    horovodrun --gloo -np 2 python examples/image_classification.py --data /usr/share/datasets/fashion-mnist

The data is laid out as ImageNet's: folders train and val, in each of them a folder for every class,
in that JPEG or PNG files. A folder with Fashion-MNIST's four files will do, too.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Run,
    add_data_argument,
    arrays_of,
    average_buffers,
    batches,
    decayed_apart,
    find_data,
    loader,
    make_aggregator,
    make_parser,
    parse,
    pick_device,
    set_learning_rate,
    total,
    warmup_then_cosine,
)
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

import adacons_hvd.torch as hvd
from adacons_hvd.logging import log_reports

FULL = {
    "model": "resnet50",
    "image_size": 224,
    "epochs": 90,
    "warmup_epochs": 5.0,
    "batch_size": 256,
    "learning_rate": 0.8,
    "weight_decay": 5e-5,
    "loaders": 8,
    "log_every": 100,
}

# --- data -----------------------------------------------------------------------------------------


class ClassFolders(Dataset[tuple[torch.Tensor, int]]):
    """A folder for every class, in alphabetical order, with JPEG or PNG files of any size.

    To train, a random part of the image is scaled to a square and mirrored half of the time; to
    test, it is the middle of the image.
    """

    def __init__(self, folder: Path, size: int, train: bool) -> None:
        if not folder.is_dir():
            raise SystemExit(f"there is no folder {folder}")
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in {".jpg", ".jpeg", ".png"}
        ]
        if not self.files:
            raise SystemExit(f"{folder} has no folders with JPEG or PNG files")
        self.size = size
        self.train = train

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, number = self.files[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        box = random_box(*image.size) if self.train else middle_box(*image.size)
        pixels = to_tensor(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        if self.train and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return pixels, number


Box = tuple[int, int, int, int]


def random_box(width: int, height: int) -> Box:
    """Between 8% and all of the image's area, neither much wider than high nor the other way round."""
    for _ in range(10):
        area = width * height * float(torch.empty(()).uniform_(0.08, 1))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            return left, top, left + w, top + h
    return middle_box(width, height)


def middle_box(width: int, height: int) -> Box:
    """A square of 7/8 of the shorter side."""
    side = max(round(min(width, height) * 7 / 8), 1)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Colours as ImageNet's networks expect them: about 0 in the mean, deviating by about 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def fashion_mnist(folder: Path, part: str) -> TensorDataset:
    """A pair of files in MNIST's format, a header and then bytes; `part` is train or t10k."""
    pixels = bytearray(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:])
    classes = bytearray(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:])
    x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28).float() / 255
    return TensorDataset((x - 0.286) / 0.353, torch.frombuffer(classes, dtype=torch.uint8).long())


def make_images(folder: Path) -> None:
    """Four classes of noisy stripes: what tells them apart is their direction, and a little their colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 128), ("val", 32)):
        for number in range(4):
            place = folder / part / f"class{number}"
            place.mkdir(parents=True)
            for index in range(count):
                width, height = rng.integers(40, 72, size=2)
                y, x = np.mgrid[:height, :width]
                # Directions that stay apart when images are mirrored.
                angle = math.pi * number / 6 + rng.normal(0, 0.1)
                wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) / 2 + rng.uniform(0, 2 * math.pi))
                colour = 20 * np.eye(4, 3)[number] + rng.normal(0, 20, 3)
                noise = rng.normal(0, 60, (height, width, 3))
                colours = 128 + colour + 60 * wave[..., None] + noise
                image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
                image.save(place / f"{index}.{'png' if index % 2 else 'JPEG'}")


def load(folder: Path, size: int) -> tuple[Any, Any, int, int]:
    """What to train and test on, the number of classes and of colours."""
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return fashion_mnist(folder, "train"), fashion_mnist(folder, "t10k"), 10, 1
    train, test = ClassFolders(folder / "train", size, True), ClassFolders(folder / "val", size, False)
    if train.classes != test.classes:
        raise SystemExit(f"{folder}: train and val have different classes")
    return train, test, len(train.classes), 3


# --- networks -------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the one in the middle makes the image smaller."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        last = nn.BatchNorm2d(4 * inner)
        # Every block begins as its shortcut alone, which large batches need to train.
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, 4 * inner, 1, bias=False), last),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * inner:
            convolution = nn.Conv2d(channels, 4 * inner, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(4 * inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network of bottlenecks; (3, 4, 6, 3) of them make ResNet-50.

    `stages` gives the features of each stage, which detectors look at.
    """

    def __init__(self, blocks: tuple[int, ...], classes: int, colours: int = 3, width: int = 64) -> None:
        super().__init__()
        stem = nn.Conv2d(colours, width, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(blocks):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            first = Bottleneck(channels, inner, stride)
            channels = 4 * inner
            self.stages.append(nn.Sequential(first, *(Bottleneck(channels, inner, 1) for _ in range(count - 1))))
        self.head: nn.Module = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.features(x)[-1].mean((2, 3)))
        return output


def small(classes: int, colours: int) -> nn.Module:
    """Three convolutions: for tens of pixels, not hundreds."""

    def layer(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    body = [*layer(colours, 16), *layer(16, 32), *layer(32, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "small": small,
    "resnet50": lambda classes, colours: ResNet((3, 4, 6, 3), classes, colours),
}

# --- training -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Any, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Loss and accuracy on the test set, of which each rank takes a part."""
    average_buffers(hvd, model)
    model.eval()
    mine = range(hvd.rank(), len(dataset), hvd.size())
    order = [list(mine[start : start + args.batch_size]) for start in range(0, len(mine), args.batch_size)]
    loss = right = 0.0
    for x, y in loader(dataset, order, args.loaders):
        x, y = x.to(device), y.to(device)
        output = model(x)
        loss += cross_entropy(output, y, reduction="sum").item()
        right += (output.argmax(1) == y).sum().item()
    model.train()
    loss, right = total(hvd, loss, right)
    return {"test_loss": loss / len(dataset), "test_accuracy": right / len(dataset)}


def main() -> None:
    # SGD's steps are as long as its gradients, so these keep the length of an average.
    parser = make_parser(__doc__, "image_classification", scale="average")
    add_data_argument(parser, "folder with train and val in ImageNet's layout, or with Fashion-MNIST's files")
    parser.set_defaults(learning_rate=0.05)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--warmup-epochs", type=float, default=0.5)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--loaders", type=int, default=0, help="processes that read images, on each rank")
    parser.add_argument("--save", type=Path, help="file for the trained weights, for object_detection.py")
    args = parse(parser, **FULL)

    hvd.init()
    device = pick_device(hvd)
    train, held_out, classes, colours = load(find_data(args, hvd, make_images), args.image_size)
    torch.manual_seed(args.seed)
    model = MODELS[args.model](classes, colours).to(device)
    groups = decayed_apart(model, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=make_aggregator(args))

    share = (len(train), args.batch_size, hvd.rank(), hvd.size(), args.seed)
    per_epoch = len(batches(*share, 0))
    steps = args.epochs * per_epoch
    run = Run(args, hvd, steps, args.model)
    if args.aggregator == "adacons":
        log_reports(optimizer, run.reports)
    # From here on, every rank cuts and mirrors images in its own way.
    torch.manual_seed(1_000_000 * (args.seed + 1) + hvd.rank())
    for epoch in range(args.epochs):
        for x, y in loader(train, batches(*share, epoch), args.loaders):
            part = warmup_then_cosine(run.taken, steps, round(args.warmup_epochs * per_epoch))
            set_learning_rate(optimizer, args.learning_rate * part)
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            run.step(loss.detach())
        run.record(**evaluate(model, held_out, args, device))
    if args.save and run.first:
        torch.save(model.state_dict(), args.save)
    run.finish(arrays_of(model))


if __name__ == "__main__":
    main()
