"""FSDP2: every block is a sharding unit, the rest of the model the root unit.

Parameters, gradients and their reduction stay fp32; bf16 runs compute under autocast, so that A_log, D, dt_bias, norms and
the router keep fp32 values without a second kind of unit. Gathering weights in bf16 would halve the traffic between GPUs and
needs those parameters in units of their own; that is not done yet.
"""

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from alloy.parallel.mesh import World


def parallelize(model: nn.Module, world: World) -> None:
    """Shard `model` over the "data" axis in place; nothing to do in a world of one.

    Blocks are the members of every `nn.ModuleList` called `layers`, those of MTP depths included.
    """
    if world.mesh is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers":
            for block in module:
                fully_shard(block, mesh=world.mesh)
    # the root stays gathered after forward: the loss takes the head's weight
    fully_shard(model, mesh=world.mesh, reshard_after_forward=False)


def release(model: nn.Module) -> None:
    """Return to sharded parameters, as before reading or saving them outside of a step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
