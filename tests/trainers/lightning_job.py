"""Lightning's modules and trainers for the tests. Runs on ranks."""

from __future__ import annotations

from typing import Any

import harness
import lightning.pytorch
import torch
from torch.utils.data import DataLoader, DistributedSampler
from trainer_job import BATCH, dataset, loss_of, network, optimizer_of

from adacons_hvd import AdaCons
from adacons_hvd.lightning import AggregationCallback


def module_of(package: Any = lightning.pytorch, logs: bool = False) -> Any:
    """A module for this package's Trainer."""

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.scores: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = loss_of(self.net, batch)
            if logs:
                self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.scores.append(loss_of(self.net, batch).item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    return Module()


class Adversaries(lightning.pytorch.LightningModule):
    """Two networks with an optimizer each, which take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = network(), torch.nn.Linear(2, 1)
        torch.nn.init.constant_(self.judge.weight, 0.3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        makers, judges = self.optimizers()
        for optimizer, loss in (
            (makers, lambda: -self.judge(self.maker(x)).mean()),
            (judges, lambda: (self.judge(self.maker(x).detach()) - self.judge(y)).mean()),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [optimizer_of(self.maker), torch.optim.SGD(self.judge.parameters(), lr=0.02)]


def data() -> DataLoader[Any]:
    """Rows by turns; the sampler that Lightning would put in shuffles them."""
    sampler = DistributedSampler(dataset(), harness.size(), harness.rank(), shuffle=False)
    return DataLoader(dataset(), batch_size=BATCH, sampler=sampler)


def trainer(package: Any = lightning.pytorch, callbacks: Any = None, **options: Any) -> Any:
    callbacks = callbacks or [AggregationCallback(AdaCons())]
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    usual = {"accelerator": "cpu", "devices": harness.size(), "strategy": "ddp", "max_epochs": 1}
    settings = {**quiet, **usual, "use_distributed_sampler": False, **options}
    return package.Trainer(callbacks=callbacks, **settings)
