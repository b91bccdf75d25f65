"""CUDA graphs: the model's calls are captured once and replayed, which spares the host its time."""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor

from ddpm_hf.pipeline.steps import weights_move

logger = logging.get_logger(__name__)
WARM_UP_CALLS = 2  # before a capture: libraries choose algorithms and allocate workspaces in a first call


class CudaBackend:
    """The stream of one graphics card's captures, and the memory of its graphs; the trainer's steps use it too."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: only one of them runs at a time

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the stream of the captures, between the work before it and the work after it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record `work` without running it. The returned function runs it; its result is always at the same place."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream the current one: the outer context ends that. Other threads may pin the
        # memory of batches meanwhile, which a capture in the mode "global" does not survive.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def free(self, graphs: dict) -> None:
        """Forget the graphs once they have run, give their memory back to the card, and take a new pool."""
        torch.cuda.synchronize(self.device)
        graphs.clear()
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()


class _Graph(NamedTuple):
    """A captured call: the tensors that it reads, by the names of the arguments, and the function that replays it."""

    inputs: dict[str, Tensor]
    replay: Callable[[], Tensor]


class GraphedModel:
    """A model whose calls are captured once as CUDA graphs and replayed from then on.

    An ordinary call launches several hundred kernels one by one, which takes the host longer than a small batch takes
    the card. A replay launches them together, with the same result. One graph is captured for each form of the inputs:
    their shapes and types, which of the optional ones are given, and the type of autocast. A graph reads the weights
    at their addresses, so new values are seen, but graphs are captured again after weights have moved or changed type,
    or the model has changed between training and evaluation.

    Where graphs cannot be used, the model is called as usual: not on a graphics card, with weights that are offloaded
    or sharded, or if a capture fails. One warning gives the reason.

    Two threads must not call one object at the same time, as the inputs of a graph are shared.

    Args:
        backend: a function of the device that returns an object with the methods of `CudaBackend`; None: the graphics
            card's. Tests give a stand-in, which works on any device.
        most: number of graphs that are kept. The one that was used longest ago is dropped for a new one.
    """

    def __init__(self, backend: Callable | None = None, most: int = 8):
        self.make_backend, self.most = backend, most
        self.backend, self.model, self.state = None, None, None
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.reason: str | None = None  # why the model is called as usual

    def prepare(self, model, device: torch.device):
        """Look at the model before a chain of calls, and forget the graphs if it is another or has changed.

        Returns:
            self
        """
        state = self._state_of(model, device)
        if model is not self.model or state != self.state:
            self.release()
            self.model, self.state, self.reason = model, state, None
            if self.make_backend is None and device.type != "cuda":
                self.reason = f"the model runs on {device.type}"
                logger.info("CUDA graphs are not used: %s", self.reason)
            elif weights_move(model):
                self._give_up("its weights are offloaded or sharded, so they have no fixed place on the card")
            else:
                self.backend = (self.make_backend or CudaBackend)(device)
        return self

    @staticmethod
    def _state_of(model, device: torch.device) -> tuple:
        tensors = [*model.parameters(), *model.buffers()]
        weights = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        return device, weights, tuple(part.training for part in model.modules())

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor, **optional: Tensor | None) -> Tensor:
        """Return the model's prediction, in memory of its own.

        Args:
            sample, timestep: those of the model's call, on its device.
            optional: further arguments of the model's call: tensors, or None for those that are not given.
        """
        inputs = {"sample": sample, "timestep": timestep, **{k: x for k, x in optional.items() if x is not None}}
        if self.reason is not None:
            return self._call(inputs)
        kind = sample.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # tensors of inference mode cannot be written to outside of it
        form = (
            autocast,
            torch.is_inference_mode_enabled(),
            *((name, x.shape, x.dtype, x.device) for name, x in inputs.items()),
        )
        if form not in self.graphs:
            try:
                self.graphs[form] = self._capture(inputs)
            except Exception as error:  # a read by the host, too little memory, a library that allocates, ...
                lines = str(error).strip().splitlines()
                self._give_up(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
                return self._call(inputs)
            if len(self.graphs) > self.most:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(form)
        graph = self.graphs[form]
        for name, x in inputs.items():
            graph.inputs[name].copy_(x, non_blocking=True)
        # the next replay, of this or of another graph in the same memory, writes over the result
        return graph.replay().clone()

    def _call(self, inputs: dict[str, Tensor]) -> Tensor:
        optional = dict(inputs)
        return self.model(optional.pop("sample"), optional.pop("timestep"), **optional).sample

    def _capture(self, inputs: dict[str, Tensor]) -> _Graph:
        held = {name: x.clone() for name, x in inputs.items()}
        kind = held["sample"].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def work() -> Tensor:
            # autocast must not keep casts of the weights from one call to the next: their memory is the graph's
            with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                return self._call(held)

        with self.backend.aside():
            for _ in range(WARM_UP_CALLS):
                work()
        return _Graph(held, self.backend.capture(work))

    def _give_up(self, reason: str) -> None:
        state = self.state  # no new attempt for this one
        self.release()
        self.state, self.reason = state, reason
        warnings.warn(f"the model is called without CUDA graphs: {reason}", stacklevel=2)

    def release(self) -> None:
        """Forget the graphs and free their memory. The next `prepare` begins afresh."""
        if self.backend is not None:
            self.backend.free(self.graphs)
        self.backend = self.state = None
