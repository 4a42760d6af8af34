"""An epoch's updates as replays of CUDA graphs.

A small network on a GPU spends its time launching kernels, not computing. A graph holds those of
one whole update and costs one launch; nothing waits for the device within an epoch. It repeats the
same kernels on the same addresses. So the position of an update in the epoch is itself a number on
the device; a short last window has a graph of its own; a scheduled learning rate is a tensor,
filled between replays; and random numbers come from generators that the graph knows, which advance
as they would without it.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from nbutils.accumulation.window import LastWindow, windows

Window = tuple[Tensor, ...]  # the micro-batches of one update: indices of training images

WARM_UPS = 3  # updates in which libraries choose kernels and allocate what they keep


def graphed_updates(
    update: Callable[[Window], None],
    images: int,
    cut: tuple[int, int, LastWindow],
    parts: dict[str, Any],
) -> Callable[[Tensor], Iterator[None]]:
    """Record `update` for every size of window that `windows(order, *cut)` cuts from an epoch.

    The `parts` of the run are left as they were, but the optimizer's state is allocated.

    Returns:
        A function of an epoch's order, shape (images,), that makes one update at each step.
    """
    model, optimizer = parts["model"], parts["optimizer"]
    device = next(model.parameters()).device
    generators = [part for part in parts.values() if isinstance(part, torch.Generator)]
    drawn_from = [each for each in generators if each.device.type == device.type]
    held_order = torch.arange(images, device=device)
    start = torch.zeros((), dtype=torch.int64, device=device)
    sizes = [sum(map(len, window)) for window in windows(held_order, *cut)]
    distinct = sorted(set(sizes), reverse=True)

    def next_update(size: int) -> None:
        places = torch.arange(size, device=device) + start
        (window,) = windows(held_order.index_select(0, places), *cut)
        update(window)
        start.add_(size)

    def trained() -> list[Tensor]:
        states = optimizer.state.values()
        return [*model.state_dict().values(), *(each for s in states for each in s.values())]

    before = [tensor.clone() for tensor in trained()]
    drawn = [generator.get_state() for generator in drawn_from]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        for size in WARM_UPS * distinct:
            start.zero_()
            next_update(size)
    zero = torch.zeros(())  # with which an optimizer's state begins
    for tensor, earlier in zip_longest(trained(), before, fillvalue=zero):
        tensor.copy_(earlier)
    for generator, state in zip(drawn_from, drawn, strict=True):
        generator.set_state(state)
    optimizer.zero_grad()
    replays = {size: record(partial(next_update, size), drawn_from) for size in distinct}

    def epoch(order: Tensor) -> Iterator[None]:
        held_order.copy_(order)
        start.zero_()
        for size in sizes:
            replays[size]()
            yield

    return epoch


def record(body: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """Record what `body` launches on the current stream; a call of the result repeats it."""
    graph = torch.cuda.CUDAGraph()
    if hasattr(graph, "register_generator_state"):  # newer versions of torch do it by themselves
        for generator in generators:
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    return graph.replay
