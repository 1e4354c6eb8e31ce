"""Images classified by ViT-B/32, with gradients clipped or not (section 5.4 and figure 8 of the paper), with PyTorch.

    horovodrun --gloo -np 2 python examples/vision_transformer.py --clip 1
    horovodrun --gloo -np 2 python examples/vision_transformer.py

The data is laid out as for image_classification.py. What is clipped is the aggregated gradient.
"""

from __future__ import annotations

import torch
from common import (
    Run,
    add_data_argument,
    arrays_of,
    batches,
    decayed_apart,
    find_data,
    loader,
    make_aggregator,
    make_parser,
    parse,
    pick_device,
    set_learning_rate,
    warmup_then_cosine,
)
from image_classification import evaluate, load, make_images
from torch import nn
from torch.nn.functional import cross_entropy

import adacons_hvd.torch as hvd
from adacons_hvd.logging import log_reports

FULL = {
    "patch": 32,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "image_size": 224,
    "epochs": 300,
    "warmup_epochs": 30.0,
    "batch_size": 128,
    "learning_rate": 3e-3,
    "weight_decay": 0.3,
    "label_smoothing": 0.11,
    "loaders": 8,
    "log_every": 100,
}


class VisionTransformer(nn.Module):
    """An image as a sequence of patches, and one more place that ends as the image's description.

    The defaults, with 1,000 classes, are ViT-B/32.
    """

    def __init__(
        self,
        classes: int,
        colours: int = 3,
        image_size: int = 224,
        patch: int = 32,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise SystemExit(f"images of {image_size} pixels cannot be cut into patches of {patch}")
        self.patches = nn.Conv2d(colours, width, patch, patch)
        self.description = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        # A TransformerEncoder is made of copies of one layer, which would all begin the same.
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
        self.head = nn.Linear(width, classes)
        # All classes are equally likely at first.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.description.expand(len(x), -1, -1), x], 1) + self.places
        output: torch.Tensor = self.head(self.layers(x)[:, 0])
        return output


def main() -> None:
    # A result of unit length, which AdamW would not mind, is never longer than what it is usually clipped to.
    parser = make_parser(__doc__, "vision_transformer", scale="average")
    add_data_argument(parser, "folder with train and val in ImageNet's layout, or with Fashion-MNIST's files")
    parser.set_defaults(learning_rate=1e-3)
    parser.add_argument("--clip", type=float, help="largest norm of the aggregated gradient; without it, no clipping")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warmup-epochs", type=float, default=2.0)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--loaders", type=int, default=0, help="processes that read images, on each rank")
    args = parse(parser, **FULL)

    hvd.init()
    device = pick_device(hvd)
    train, held_out, classes, colours = load(find_data(args, hvd, make_images), args.image_size)
    size = train[0][0].shape[-1]
    torch.manual_seed(args.seed)
    model = VisionTransformer(classes, colours, size, args.patch, args.width, args.depth, args.heads).to(device)
    optimizer = torch.optim.AdamW(decayed_apart(model, args.weight_decay), lr=args.learning_rate)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=make_aggregator(args))

    share = (len(train), args.batch_size, hvd.rank(), hvd.size(), args.seed)
    per_epoch = len(batches(*share, 0))
    steps = args.epochs * per_epoch
    run = Run(args, hvd, steps, "unclipped" if args.clip is None else f"clip{args.clip:g}")
    if args.aggregator == "adacons":
        log_reports(optimizer, run.reports)
    # From here on, every rank cuts and mirrors images in its own way.
    torch.manual_seed(1_000_000 * (args.seed + 1) + hvd.rank())
    for epoch in range(args.epochs):
        for x, y in loader(train, batches(*share, epoch), args.loaders):
            part = warmup_then_cosine(run.taken, steps, round(args.warmup_epochs * per_epoch))
            set_learning_rate(optimizer, args.learning_rate * part)
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(device)), y.to(device), label_smoothing=args.label_smoothing)
            loss.backward()
            optimizer.synchronize()
            if args.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            with optimizer.skip_synchronize():
                optimizer.step()
            run.step(loss.detach())
        run.record(**evaluate(model, held_out, args, device))
    run.finish(arrays_of(model))


if __name__ == "__main__":
    main()
