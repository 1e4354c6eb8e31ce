"""Objects found by RetinaNet with focal loss (section 4.3 of the paper), with PyTorch.

    horovodrun --gloo -np 2 python examples/object_detection.py

The data is laid out as COCO's: annotations/instances_train*.json and instances_val*.json, with the
images in folders train* and val*.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
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
    find_data,
    loader,
    make_aggregator,
    make_parser,
    parse,
    pick_device,
    set_learning_rate,
    warmup_then_cosine,
)
from image_classification import ResNet, to_tensor
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, l1_loss
from torch.utils.data import Dataset

import adacons_hvd.torch as hvd
from adacons_hvd.logging import log_reports

FULL = {
    "blocks": [3, 4, 6, 3],
    "width": 64,
    "pyramid": 256,
    "head_depth": 4,
    "image_size": 800,
    "epochs": 8,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "warmup_epochs": 1.0,
    "loaders": 8,
    "log_every": 100,
}

# --- data -----------------------------------------------------------------------------------------

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Coco(Dataset[Sample]):
    """Images as squares, with the boxes (left, top, right, bottom) and classes of what is on them.

    Classes are numbered from 0, in the order of the categories' ids. Crowds, and boxes of which
    nothing lies within the image, are left out.
    """

    def __init__(self, data: Path, part: str, size: int, train: bool) -> None:
        found = sorted((data / "annotations").glob(f"instances_{part}*.json"))
        folders = [path for path in sorted(data.glob(f"{part}*")) if path.is_dir()]
        if len(found) != 1 or len(folders) != 1:
            raise SystemExit(f"{data} must have one annotations/instances_{part}*.json and one folder {part}*")
        self.folder, self.size, self.train = folders[0], size, train
        with found[0].open(encoding="utf-8") as file:
            content = json.load(file)
        try:
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = [category["name"] for category in categories]
            numbers = {category["id"]: number for number, category in enumerate(categories)}
            self.images = sorted(content["images"], key=lambda image: image["id"])
            self.files = [image["file_name"] for image in self.images]
            sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
            self.objects: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
            for annotation in content["annotations"]:
                image = annotation["image_id"]
                box = corners(annotation["bbox"], *sizes[image])
                if not annotation.get("iscrowd") and box[0] < box[2] and box[1] < box[3]:
                    self.objects[image].append((box, numbers[annotation["category_id"]]))
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"{found[0]} is not as COCO's annotations are: {error!r}") from error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        with Image.open(self.folder / self.files[index]) as file:
            pixels = to_tensor(file.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR))
        objects = self.objects[image["id"]]
        boxes = torch.tensor([box for box, _ in objects]).view(-1, 4)
        boxes = boxes * self.size / torch.tensor([image["width"], image["height"]] * 2)
        if self.train and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
            boxes = torch.stack([self.size - boxes[:, 2], boxes[:, 1], self.size - boxes[:, 0], boxes[:, 3]], 1)
        return pixels, boxes, torch.tensor([number for _, number in objects], dtype=torch.long)


def corners(bbox: list[float], width: int, height: int) -> list[float]:
    """COCO's (left, top, width, height) as left, top, right and bottom, within the image."""
    left, top, w, h = bbox
    return [max(left, 0.0), max(top, 0.0), min(left + w, float(width)), min(top + h, float(height))]


def collate(samples: list[Sample]) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Images as one tensor; boxes and classes stay lists, since images have different numbers of them."""
    pixels, boxes, numbers = zip(*samples, strict=True)
    return torch.stack(pixels), list(boxes), list(numbers)


def make_shapes(folder: Path) -> None:
    """Bright rectangles, ellipses and triangles on noise, annotated as COCO is."""
    rng = np.random.default_rng(0)
    categories = [{"id": 1, "name": "rectangle"}, {"id": 4, "name": "ellipse"}, {"id": 9, "name": "triangle"}]
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train", 256), ("val", 64)):
        (folder / part).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            width, height = map(int, rng.integers(100, 160, 2))
            image = Image.fromarray(rng.integers(0, 100, (height, width, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            # One on each side, so that none hides another.
            for side in range(2):
                w, h = rng.integers(24, width // 2 - 4), rng.integers(24, height - 4)
                left, top = side * width // 2 + rng.integers(0, width // 2 - w), rng.integers(0, height - h)
                kind = int(rng.integers(3))
                colour = tuple(map(int, rng.integers(150, 256, 3)))
                box = [int(left), int(top), int(left + w), int(top + h)]
                if kind == 0:
                    draw.rectangle(box, colour)
                elif kind == 1:
                    draw.ellipse(box, colour)
                else:
                    draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], colour)
                annotation = {"id": len(annotations), "image_id": number, "category_id": categories[kind]["id"]}
                annotations.append({**annotation, "bbox": [box[0], box[1], int(w), int(h)], "iscrowd": 0})
            name = f"{number:06}.jpg"
            image.save(folder / part / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content), encoding="utf-8")


# --- network --------------------------------------------------------------------------------------


class RetinaNet(nn.Module):
    """A ResNet, a pyramid of its features at five sizes, and two heads that look at all of them.

    The defaults are those of the literature, with ResNet-50.
    """

    ANCHORS = 9

    def __init__(
        self,
        classes: int,
        blocks: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        pyramid: int = 256,
        head_depth: int = 4,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = ResNet(blocks, 1, width=width)
        # Classification is not its task here.
        self.backbone.head = nn.Identity()
        self.backbone_is_given = False
        channels = [4 * width * 2**stage for stage in (1, 2, 3)]
        self.lateral = nn.ModuleList(nn.Conv2d(c, pyramid, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in channels)
        self.sixth = nn.Conv2d(channels[-1], pyramid, 3, 2, 1)
        self.seventh = nn.Conv2d(pyramid, pyramid, 3, 2, 1)
        self.scores = self._head(pyramid, head_depth, self.ANCHORS * classes)
        self.offsets = self._head(pyramid, head_depth, self.ANCHORS * 4)
        # At first everything is background with 99%, or the many anchors without an object would drown the others.
        nn.init.constant_(self.scores[-1].bias, -math.log(99))  # type: ignore[arg-type]

    @staticmethod
    def _head(channels: int, depth: int, outputs: int) -> nn.Sequential:
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth)]
        convolutions.append(nn.Conv2d(channels, outputs, 3, padding=1))
        for convolution in convolutions:
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        return nn.Sequential(*(layer for c in convolutions[:-1] for layer in (c, nn.ReLU())), convolutions[-1])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """For every anchor the logits of all classes and four offsets; and the sizes of the pyramid's levels."""
        features = self.backbone.features(x)[1:]
        levels = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for k in (1, 0):
            levels[k] = levels[k] + interpolate(levels[k + 1], levels[k].shape[-2:])
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        levels.append(self.sixth(features[-1]))
        levels.append(self.seventh(torch.relu(levels[-1])))

        def rows(head: nn.Module, size: int) -> torch.Tensor:
            return torch.cat([head(level).permute(0, 2, 3, 1).reshape(len(x), -1, size) for level in levels], 1)

        return rows(self.scores, self.classes), rows(self.offsets, 4), [tuple(f.shape[-2:]) for f in levels]

    def load_backbone(self, path: Path) -> None:
        """Take the weights of a classifier: of image_classification.py, or another ResNet's with layers in its order.

        Its normalizations stay as they are, since detectors' batches are small.
        """
        given = list(torch.load(path, map_location="cpu", weights_only=True).values())
        own = self.backbone.state_dict()
        # What is over at the end is the layer that names classes.
        if [value.shape for value in own.values()] != [value.shape for value in given[: len(own)]]:
            raise SystemExit(f"{path} does not hold the weights of a ResNet like this one")
        self.backbone.load_state_dict(dict(zip(own, given, strict=False)))
        self.backbone_is_given = True
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> RetinaNet:
        super().train(mode)
        if self.backbone_is_given:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


# --- anchors --------------------------------------------------------------------------------------

#: What an anchor is matched with, where it is not the number of an object.
BACKGROUND, IGNORED = -1, -2


def make_anchors(levels: list[tuple[int, int]]) -> torch.Tensor:
    """Nine boxes around every place of every level, in the order of the network's output."""
    anchors = []
    for exponent, (rows, columns) in enumerate(levels, start=3):
        stride = 2.0**exponent
        sides = [4 * stride * 2 ** (third / 3) for third in range(3)]
        halves = [(side / math.sqrt(r) / 2, side * math.sqrt(r) / 2) for side in sides for r in (0.5, 1.0, 2.0)]
        shapes = torch.tensor([[-w, -h, w, h] for w, h in halves])
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = stride * torch.stack([x, y, x, y], -1)
        anchors.append((centres[:, :, None] + shapes).view(-1, 4))
    return torch.cat(anchors)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every box of `a` with every box of `b`."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (bottom_right - top_left).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return common / (areas[0][:, None] + areas[1] - common)


def match(anchors: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """For each anchor the object it is to find, BACKGROUND, or IGNORED where it is neither here nor there."""
    if len(boxes) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    overlap = overlaps(anchors, boxes)
    best, which = overlap.max(1)
    found = torch.where(best < 0.5, IGNORED, which)
    found = torch.where(best < 0.4, BACKGROUND, found)
    # Every object has the anchors that overlap it most, however little that is.
    closest = (overlap == overlap.max(0).values) & (overlap > 0)
    return torch.where(closest.any(1), closest.int().argmax(1), found)


def encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """How to get from anchors to boxes: shifts in units of the anchor's sides, and logarithms of the sides' ratios."""
    sides, anchor_sides = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
    return torch.cat([shift / anchor_sides, (sides / anchor_sides).log()], 1)


def decode(offsets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`, with a limit to what an untrained network may ask for."""
    anchor_sides = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + offsets[:, :2] * anchor_sides
    half = anchor_sides * offsets[:, 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Cross entropy in which what is already well classified hardly counts, summed (arXiv 1708.02002, eq. 5)."""
    right = torch.where(targets == 1, logits, -logits).sigmoid()
    weight = torch.where(targets == 1, alpha, 1 - alpha)
    return (weight * (1 - right) ** gamma * binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def loss_of(
    output: tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]],
    boxes: list[torch.Tensor],
    numbers: list[torch.Tensor],
) -> torch.Tensor:
    """Focal loss for the classes and distance for the offsets, by the number of matched anchors, mean of the images."""
    scores, offsets, levels = output
    anchors = make_anchors(levels).to(scores.device)
    losses = []
    for logits, offset, own_boxes, own_numbers in zip(scores, offsets, boxes, numbers, strict=True):
        own_boxes, own_numbers = own_boxes.to(scores.device), own_numbers.to(scores.device)
        found = match(anchors, own_boxes)
        matched = found >= 0
        targets = torch.zeros_like(logits)
        targets[matched, own_numbers[found[matched]]] = 1
        loss = focal_loss(logits[found != IGNORED], targets[found != IGNORED])
        wanted = encode(own_boxes[found[matched]], anchors[matched])
        losses.append((loss + l1_loss(offset[matched], wanted, reduction="sum")) / matched.sum().clamp(min=1))
    return torch.stack(losses).mean()


# --- what was found -------------------------------------------------------------------------------

#: Boxes, how sure the network is of them, and their classes.
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def distinct(boxes: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The boxes to keep, best first: none overlaps a better one of its class by more than half."""
    order = scores.argsort(descending=True, stable=True)
    boxes, numbers = boxes[order], numbers[order]
    rivals = (overlaps(boxes, boxes) > 0.5) & (numbers[:, None] == numbers)
    alive = torch.ones(len(order), dtype=torch.bool)
    kept = []
    for index in range(len(order)):
        if alive[index]:
            kept.append(index)
            alive &= ~rivals[index]
    return order[kept]


def detect(logits: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor, size: int) -> Found:
    """Up to 100 objects in an image, from the network's output for it."""
    scores, places = logits.sigmoid().flatten().topk(min(1000, logits.numel()))
    scores, places = scores[scores > 0.05], places[scores > 0.05]
    which, numbers = places // logits.shape[1], places % logits.shape[1]
    boxes = decode(offsets[which], anchors[which]).clamp(0, size)
    kept = distinct(boxes, scores, numbers)[:100]
    return boxes[kept], scores[kept], numbers[kept]


def mean_average_precision(images: list[tuple[Found, torch.Tensor, torch.Tensor]], classes: int) -> float:
    """COCO's measure, AP at overlaps of 0.5, 0.55 ... 0.95, of what was found beside the true boxes and classes."""
    thresholds = np.linspace(0.5, 0.95, 10)
    values = []
    for number in range(classes):
        objects = 0
        scores: list[float] = []
        hits: list[np.ndarray] = []
        for (boxes, sure, numbers), true_boxes, true_numbers in images:
            truth = true_boxes[true_numbers == number]
            objects += len(truth)
            free = np.ones((10, len(truth)), dtype=bool)
            # The best first; each takes the object that it overlaps most, of those that are left.
            for row, score in zip(overlaps(boxes, truth)[numbers == number], sure[numbers == number], strict=True):
                hit = np.zeros(10, dtype=bool)
                if len(truth):
                    candidates = np.where(free, row.numpy(), -1.0)
                    choice = candidates.argmax(1)
                    hit = candidates.max(1) >= thresholds
                    free[hit, choice[hit]] = False
                scores.append(float(score))
                hits.append(hit)
        if objects and hits:
            right = np.array(hits)[np.argsort(-np.array(scores), kind="stable")].cumsum(0)
            precision = right / np.arange(1, len(right) + 1)[:, None]
            # At a recall, the best precision with that recall or more; 0 where it is never reached.
            envelope = np.vstack([np.maximum.accumulate(precision[::-1])[::-1], np.zeros(10)])
            for column, recall in enumerate((right / objects).T):
                values.append(envelope[np.searchsorted(recall, np.linspace(0, 1, 101)), column].mean())
        elif objects:
            values += [0.0] * 10
    return float(np.mean(values)) if values else 0.0


# --- training -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: RetinaNet, dataset: Coco, batch_size: int, loaders: int, device: torch.device) -> float:
    """Mean average precision on the test set, of which each rank looks at a part."""
    average_buffers(hvd, model)
    model.eval()
    mine = range(hvd.rank(), len(dataset), hvd.size())
    order = [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
    images = []
    for pixels, boxes, numbers in loader(dataset, order, loaders, collate):
        scores, offsets, levels = model(pixels.to(device))
        anchors = make_anchors(levels)
        for logits, offset, *truth in zip(scores.cpu(), offsets.cpu(), boxes, numbers, strict=True):
            images.append((detect(logits, offset, anchors, dataset.size), *truth))
    model.train()
    everything = [image for share in hvd.allgather_object(images) for image in share]
    return mean_average_precision(everything, len(dataset.classes))


def main() -> None:
    parser = make_parser(__doc__, "object_detection")
    add_data_argument(parser, "folder in COCO's layout")
    parser.set_defaults(batch_size=8, learning_rate=2e-3)
    parser.add_argument("--blocks", type=int, nargs=4, default=[1, 1, 1, 1], help="in the stages of the ResNet")
    parser.add_argument("--width", type=int, default=8, help="of its first stage")
    parser.add_argument("--backbone", type=Path, help="file with its trained weights")
    parser.add_argument("--pyramid", type=int, default=32, help="channels of the features")
    parser.add_argument("--head-depth", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--warmup-epochs", type=float, default=1.0)
    parser.add_argument("--loaders", type=int, default=0, help="processes that read images, on each rank")
    args = parse(parser, **FULL)

    hvd.init()
    device = pick_device(hvd)
    data = find_data(args, hvd, make_shapes)
    train, held_out = (Coco(data, part, args.image_size, part == "train") for part in ("train", "val"))
    torch.manual_seed(args.seed)
    model = RetinaNet(len(train.classes), tuple(args.blocks), args.width, args.pyramid, args.head_depth)
    if args.backbone:
        model.load_backbone(args.backbone)
    model.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = hvd.DistributedOptimizer(optimizer, trained, aggregator=make_aggregator(args))

    share = (len(train), args.batch_size, hvd.rank(), hvd.size(), args.seed)
    per_epoch = len(batches(*share, 0))
    steps = args.epochs * per_epoch
    run = Run(args, hvd, steps)
    if args.aggregator == "adacons":
        log_reports(optimizer, run.reports)
    # From here on, every rank mirrors images in its own way.
    torch.manual_seed(1_000_000 * (args.seed + 1) + hvd.rank())
    for epoch in range(args.epochs):
        for pixels, boxes, numbers in loader(train, batches(*share, epoch), args.loaders, collate):
            part = warmup_then_cosine(run.taken, steps, round(args.warmup_epochs * per_epoch))
            set_learning_rate(optimizer, args.learning_rate * part)
            optimizer.zero_grad()
            loss = loss_of(model(pixels.to(device)), boxes, numbers)
            loss.backward()
            optimizer.step()
            run.step(loss.detach())
        if epoch % 5 == 4 or epoch == args.epochs - 1:
            run.record(test_map=evaluate(model, held_out, args.batch_size, args.loaders, device))
    run.finish(arrays_of(model))


if __name__ == "__main__":
    main()
