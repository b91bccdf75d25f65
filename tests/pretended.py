"""A device that is pretended: its tensors have values, and refuse to be computed with together with those of the CPU.

So it shows without a graphics card what happens to tensors of several devices. The meta device refuses them too, but
has no values, and can be neither copied to the CPU nor looked at.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # a type of device that torch has guards for on any machine
# These take an index, or a tensor to be copied, from the CPU on a real card too.
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor}


class There(Tensor):
    """A tensor of the pretended device; `values` are its values."""

    @staticmethod
    def __new__(cls, values: Tensor):
        like = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        self = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, device=DEVICE, requires_grad=values.requires_grad, **like
        )
        self.values = values
        return self

    def __repr__(self):
        return f"There({self.values})"

    # torch would look for the device's own functions first
    def item(self):
        return self.values.item()

    def tolist(self):
        return self.values.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")
        return self.values.numpy(force=True)

    def __bool__(self):
        return bool(self.values)

    def __float__(self):
        return float(self.values)

    def __int__(self):
        return int(self.values)

    def __format__(self, spec):
        return format(self.values, spec)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Makes new tensors on the pretended device where that is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif there and function not in COPIES:
        here = [x for x in tensors if not isinstance(x, There) and x.ndim]
        if here:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, cpu and {DEVICE}")
    elif function is torch.ops.aten.copy_.default:
        there = isinstance(args[0], There)
    bare_args, bare_kwargs = tree_map_only(There, lambda x: x.values, (args, kwargs))
    out = function(*bare_args, **bare_kwargs)
    if function is torch.ops.aten._to_copy.default and asked is None:
        there = isinstance(args[0], There)
    if not there:
        return out
    for given, bare in zip(args, bare_args):  # an operation in place gives back its own tensor
        if isinstance(given, There) and out is bare:
            return given
    return tree_map_only(Tensor, There, out)
