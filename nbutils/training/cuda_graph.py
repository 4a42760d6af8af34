"""An epoch's updates as replays of CUDA graphs.

A small network on a GPU spends its time launching kernels, not computing. So one whole update is
recorded as a CUDA graph: reading its images' numbers from the epoch's order, gathering the images,
the passes forward and backward of all micro-batches, the optimizer's step, and adding to the
epoch's sums. Replaying it costs one launch, and nothing waits for the device within an epoch.

A graph repeats the same kernels on the same addresses. So where an update stands in the epoch is
itself a number on the device; a short last window has a graph of its own; a scheduled learning
rate is a tensor, filled between replays; and random numbers come from generators that the graph
knows, which advance as they would without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Window = tuple[Tensor, ...]

WARM_UPS = 3
"""Updates made before recording, in which libraries choose kernels and allocate what they keep."""


class GraphedEpoch:
    """Runs `update` on every window of an epoch by replaying it.

    Building it leaves weights, buffers, generators and the optimizer as they were, the latter
    with its state allocated and zero.

    Args:
        update: One update with a window of image numbers; all that it does must be on the device,
            with no wait for it.
        cut: Cuts an order of images into windows, as `accumulation.windows` does.
        images: Length of an epoch's order.
        model: What `update` trains.
        optimizer: Not yet stepped, and able to be captured.
        generators: All generators that `update` draws from, on the device.
    """

    def __init__(
        self,
        update: Callable[[Window], None],
        cut: Callable[[Tensor], Iterator[Window]],
        images: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator],
    ) -> None:
        if optimizer.state:
            raise ValueError("the optimizer has made steps; graphs are recorded before training")
        self.update = update
        self.cut = cut
        device = next(model.parameters()).device
        self.order = torch.arange(images, device=device)
        self.start = torch.zeros((), dtype=torch.int64, device=device)
        self.sizes = [sum(map(len, window)) for window in cut(self.order)]
        distinct = sorted(set(self.sizes), reverse=True)
        with _put_back(model, optimizer, generators):
            for size in distinct:
                for _ in range(WARM_UPS):
                    self.start.zero_()
                    self._next_update(size)
        optimizer.zero_grad()
        self.replays = {
            size: record(lambda size=size: self._next_update(size), generators)  # type: ignore[misc]
            for size in distinct
        }

    def epoch(self, order: Tensor) -> Iterator[None]:
        """Make the updates of one epoch over `order`; yields after each has been launched."""
        self.order.copy_(order)
        self.start.zero_()
        for size in self.sizes:
            self.replays[size]()
            yield

    def _next_update(self, size: int) -> None:
        places = torch.arange(size, device=self.order.device) + self.start
        (window,) = self.cut(self.order.index_select(0, places))
        self.update(window)
        self.start += size


def record(body: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """Record what `body` launches on the current stream; a call of the result repeats it."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    return graph.replay


@contextmanager
def _put_back(
    model: nn.Module, optimizer: torch.optim.Optimizer, generators: Sequence[torch.Generator]
) -> Iterator[None]:
    """Undo in place, at the end, what updates change: graphs are to find the same addresses."""
    tensors = list(model.state_dict().values())
    before = [tensor.clone() for tensor in tensors]
    states = [generator.get_state() for generator in generators]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for generator, generator_state in zip(generators, states, strict=True):
        generator.set_state(generator_state)
