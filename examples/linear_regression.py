"""Stochastic linear regression (section 4.1 of the paper), with PyTorch.

    horovodrun --gloo -np 2 python examples/linear_regression.py

Minimizes E[(w'z)^2] / 2 over w, where z is uniform in the unit cube. Each worker has samples of its
own; along whatever direction their gradients are aggregated to, the step is the best one there is.
`linear_regression_keras.py` is the same with Keras.
"""

from __future__ import annotations

import torch
from common import Run, arrays_of, make_aggregator, make_parser, parse, pick_device

import adacons_hvd.torch as hvd
from adacons_hvd.logging import log_reports

FULL = {"steps": 1000}


def hessian_times(v: torch.Tensor) -> torch.Tensor:
    """E[z z'] v. The entries of z are independent with mean 1/2 and variance 1/12."""
    return v / 12 + v.sum() / 4


def main() -> None:
    parser = make_parser(__doc__, "linear_regression")
    parser.set_defaults(batch_size=128, learning_rate=1.0)
    parser.add_argument("--dimension", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    args = parse(parser, **FULL)

    hvd.init()
    device = pick_device(hvd)
    torch.manual_seed(args.seed)
    model = torch.nn.Linear(args.dimension, 1, bias=False).to(device)
    torch.nn.init.normal_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=make_aggregator(args))

    run = Run(args, hvd, args.steps)
    if args.aggregator == "adacons":
        log_reports(optimizer, run.reports)
    draw = torch.Generator(device).manual_seed(1_000_000 * (args.seed + 1) + hvd.rank())
    w = model.weight
    for _ in range(args.steps):
        z = torch.rand(args.batch_size, args.dimension, device=device, generator=draw)
        optimizer.zero_grad()
        (model(z).square().mean() / 2).backward()
        optimizer.synchronize()
        with torch.no_grad():
            # The least of a quadratic along a line: slope over curvature.
            assert w.grad is not None
            direction = w.grad[0]
            slope, curvature = direction @ hessian_times(w[0]), direction @ hessian_times(direction)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (slope / curvature).item()
        with optimizer.skip_synchronize():
            optimizer.step()
        with torch.no_grad():
            run.step(w[0] @ hessian_times(w[0]) / 2)
    run.finish(arrays_of(model))


if __name__ == "__main__":
    main()
