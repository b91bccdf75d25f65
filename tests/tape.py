"""A stand-in for a card's graphs, on CPU: it records the operations of a step and replays them on the same memory.

As with a CUDA graph, a capture computes nothing, a replay runs none of the Python code, Python's numbers stay those of
the capture, and reading a number back ends a capture. `Tape` has the methods of `StepBackend`.
"""

import contextlib
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Recording(TorchDispatchMode):
    """Records operations with aliases of their tensors, and keeps the values that in-place operations overwrite."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.overwritten = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        arguments = func._schema.arguments
        for i, argument in enumerate(arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.made | set(self.overwritten):
                    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                    self.overwritten[x.untyped_storage().data_ptr()] = (whole, whole.clone())
        result = func(*args, **kwargs)
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
        if not aliases:  # the memory is new
            self.made |= {x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, Tensor)}
        if writes or not aliases:  # a view needs no replay
            held = tree_map_only(Tensor, torch.Tensor.detach, (func, args, kwargs, None if aliases else result))
            self.operations.append(held)
        return result


class Tape:
    """What happens is counted in `events`: "aside", "capture", "replay", "watch", "free"."""

    full = False

    def __init__(self, clock=time.perf_counter):
        self.events, self.mark = [], clock

    @staticmethod
    def seconds(start, end):
        return end - start

    @contextlib.contextmanager
    def aside(self):
        self.events.append("aside")
        yield

    def capture(self, work):
        self.events.append("capture")
        random = torch.get_rng_state()
        recording = Recording()
        try:
            with recording:
                result = work()
        finally:
            torch.set_rng_state(random)
            for memory, values in recording.overwritten.values():
                memory.copy_(values)

        def replay():
            self.events.append("replay")
            with torch.no_grad():
                for func, args, kwargs, held in recording.operations:
                    made = func(*args, **kwargs)
                    for x, y in zip(tree_leaves(held), tree_leaves(made)):
                        if isinstance(x, Tensor):
                            x.copy_(y)
            return result

        return replay

    @contextlib.contextmanager
    def watch(self, found):
        self.events.append("watch")

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in READS:
                    found.append(f"called a synchronizing operation: {func}")
                return func(*args, **(kwargs or {}))

        with Watch():
            yield

    def crowded(self):
        return self.full

    def free(self, graphs):
        self.events.append("free")
        graphs.clear()
