"""torch.compile as this suite uses it. Importing this loads torch's compiler, so do it where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._functorch.partitioners import default_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx import GraphModule


def compiled(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """``module`` compiled at its first call, for inputs of fixed shapes.

    On a GPU its kernels are replayed as CUDA graphs. On a CPU the backward pass uses what the forward pass
    computed instead of computing it again to save memory: elementwise arithmetic is what costs time there.
    """
    if device.type == "cuda":
        return torch.compile(module, mode="reduce-overhead")
    return torch.compile(module, options={"custom_partitioner_fn": KeepAll()})


class KeepAll(CustomPartitionerFn):
    """Cuts a joint graph where the forward pass ends, with nothing computed twice."""

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return default_partition(
            gm,
            joint_inputs,
            num_fwd_outputs=kwargs["num_fwd_outputs"],
            static_lifetime_input_indices=kwargs.get("static_lifetime_input_indices"),
        )

    def uuid(self) -> str:
        return "mimbench.compiling.KeepAll"  # tells torch's cache of compiled code what made it
