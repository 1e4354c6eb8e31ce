"""Fashion-MNIST classified by a small network, with plain Horovod.

    horovodrun --gloo -np 4 python examples/fashion_mnist.py

`fashion_mnist.diff` is what it takes to use AdaCons instead of averaging. The data is that of
Debian's package dataset-fashion-mnist; --data names another folder with the same four files.
"""

import argparse
import gzip
from pathlib import Path

import horovod.torch as hvd
import torch
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=64, help="of each worker")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--samples", type=int, default=60_000, help="of the training set to use")
args = parser.parse_args()


def load(images: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a pair of files in MNIST's format: a header, then bytes."""
    pixels = bytearray(gzip.decompress((args.data / images).read_bytes())[16:])
    classes = bytearray(gzip.decompress((args.data / labels).read_bytes())[8:])
    x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28).float() / 255
    return (x - 0.286) / 0.353, torch.frombuffer(classes, dtype=torch.uint8).long()


hvd.init()
torch.manual_seed(0)

x, y = load("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
# Every worker its own part of the data, as many batches as the others.
x, y = x[: args.samples][hvd.rank() :: hvd.size()], y[: args.samples][hvd.rank() :: hvd.size()]
batches = args.samples // hvd.size() // args.batch_size

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, stride=2, padding=1),
    torch.nn.ReLU(),
    torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 7 * 7, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())

for epoch in range(args.epochs):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    total = 0.0
    for batch in order[: batches * args.batch_size].view(batches, -1):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        total += loss.item()
    loss = hvd.allreduce(torch.tensor(total / batches), name="loss")
    if hvd.rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss:.4f}", flush=True)

with torch.no_grad():
    x, y = load("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    accuracy = (model(x).argmax(1) == y).float().mean()
if hvd.rank() == 0:
    print(f"test accuracy {accuracy:.4f}")
