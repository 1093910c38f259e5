"""The processes of a run: started by torchrun or alone, one device mesh, and the few collectives that training needs.

`torchrun --nproc-per-node 8 -m alloy pretrain ...` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the world is one process
and no process group exists, so that single runs pay nothing.
"""

import contextlib
import os
import sys
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from alloy.errors import AlloyError, InterruptedRun, ResourceError


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of the run. `mesh` is None for a single process; its axis is "data"."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Largest value over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def first(self, value: object) -> object:
        """The value that rank 0 holds."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """The values of all ranks, in rank order, on every rank."""
        if self.mesh is None:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()


def start_world(device: torch.device) -> World:
    """Join the run that torchrun describes in the environment, or be the only process.

    `device` is the kind asked for; on CUDA each process takes the GPU of its LOCAL_RANK.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(rank=0, size=1, device=device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ResourceError(
                f"local rank {local} has no GPU: this host shows {torch.cuda.device_count()}; lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
    return World(rank=dist.get_rank(), size=size, device=device, mesh=mesh)


@contextlib.contextmanager
def clean_exit() -> Generator[None]:
    """Around a whole command: a process of a distributed run ends here, by `os._exit`, with its code.

    torch 2.13 with gloo may abort at interpreter exit after FSDP2, which would hide the code. A single process just goes on.
    """
    try:
        yield
    except AlloyError as error:
        if not dist.is_initialized():
            raise
        # a stop is the same on all ranks, other errors may be one rank's alone
        if dist.get_rank() == 0 or not isinstance(error, InterruptedRun):
            sys.stderr.write(f"rank {dist.get_rank()}: error: {error}\n")
        _end_process(error.exit_code)
    if dist.is_initialized():
        _end_process(0)


def _end_process(code: int) -> NoReturn:
    if dist.get_backend() == "gloo":
        # torchrun ends all ranks with the first one that fails: let rank 0 finish writing, but do not wait for the dead
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(timeout=timedelta(seconds=10))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
