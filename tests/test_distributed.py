"""Parallel training on torch's own engine: two processes under DDP and under FSDP2 end where one process does."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lstm import LSTM, Recurrent, cells

T, B, I, H = 3, 4, 3, 4  # noqa: E741
STEPS = 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = LSTM(I, H, num_layers=2, bidirectional=True)
        self.gru = Recurrent(cells.gru, 2 * H, H)
        self.out = nn.Linear(H, 1)

    def forward(self, x):
        return self.out(self.gru(self.lstm(x)[0])[0])


def train(model, rows):
    """Some steps on the given rows of the batch; the loss is a mean, as the gradients of data parallel training are."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    data = torch.randn(STEPS, T, B, I, generator=torch.Generator().manual_seed(1))
    for x in data[:, :, rows]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(rank, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = Model()
        if kind == "ddp":
            train(DistributedDataParallel(model), slice(rank, None, 2))
            state = model.state_dict()
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
            fully_shard(model.lstm, mesh=mesh)
            fully_shard(model.gru, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, slice(rank, None, 2))
            dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/checkpoint")
            state = {name: value.full_tensor() for name, value in model.state_dict().items()}
        if rank == 0:
            torch.save(state, f"{folder}/state.pt")
    finally:
        dist.destroy_process_group()
    # A thread of gloo's may still hold a tensor, whose release aborts an interpreter that is ending: do not end it.
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind, tmp_path):
    mp.spawn(worker, (kind, str(tmp_path)), nprocs=2)
    alone = Model()
    train(alone, slice(None))
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == alone.state_dict().keys()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=lambda text, name=name: f"{name}: {text}")
    if kind == "fsdp":  # the sharded checkpoint, read by one process
        other = Model()
        for parameter in other.parameters():
            parameter.data.zero_()
        loaded = {"model": get_model_state_dict(other)}
        dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
        set_model_state_dict(other, loaded["model"])
        torch.testing.assert_close(other.state_dict(), alone.state_dict())
