"""A model and a Trainer of Transformers for the tests. Runs on ranks."""

from __future__ import annotations

from typing import Any

import torch
from trainer_job import BATCH, dataset, network, optimizer_of
from transformers import Trainer, TrainingArguments

from adacons_hvd import AdaCons
from adacons_hvd.transformers import AggregationMixin


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(x)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


class Own(Trainer):
    """A subclass as people write them: rows in their order, an optimizer of its own."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, *_: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = optimizer_of(self.model)
        return self.optimizer


class OwnTrainer(AggregationMixin, Own):
    pass


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"x": x, "labels": y} for x, y in dataset()]


def trainer(folder: Any, model: Any = None, cls: Any = OwnTrainer, **options: Any) -> Any:
    names = {"aggregator", "aggregation"}
    given = {"aggregator": AdaCons(), **{name: options.pop(name) for name in names & set(options)}}
    settings = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    args = TrainingArguments(str(folder), **settings)
    data = rows()
    return cls(Model() if model is None else model, args, train_dataset=data, eval_dataset=data[:12], **given)
