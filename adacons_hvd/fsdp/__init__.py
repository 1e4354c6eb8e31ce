"""An aggregator for PyTorch's ``fully_shard`` (FSDP2), without Horovod.

    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters())
    adacons_hvd.fsdp.attach(model, optimizer, AdaCons())      # the one new line

Everything else about the script stays, and so does how it is started: ``torchrun``.
"""

from .attaching import attach

__all__ = ["attach"]
