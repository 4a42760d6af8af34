"""A window's gradient on a CPU, in pieces that fit the cache, dealt to threads.

Where no normalisation couples the images of a batch, the gradient of a micro-batch is the sum of
its pieces' gradients, whatever the cut. So each micro-batch is cut into pieces small enough for
the processor's cache, and each thread works through pieces of its own on one core, which wastes
less than several cores on one operation at a time. The threads' sums are added in a fixed order:
the result repeats bitwise for a given number of threads.

With batch or ghost norm the micro-batches stay whole, and torch spreads each operation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.data.dataset import move
from nbutils.training.model import DigitCNN

PIECE = 128
"""Most images in a piece; `DigitCNN` then keeps 23 MB for the backward pass, in float32."""

Outcome = TypeVar("Outcome")


class Pieces:
    """Threads that compute the gradients and logits of one model; a context manager.

    Args:
        model: On the CPU. Its parameters get the gradients.
        separable: Whether the images of a batch do not see each other while training.
        threads: Cores to use, >= 1.
    """

    def __init__(self, model: DigitCNN, separable: bool, threads: int) -> None:
        self.model = model
        self.separable = separable
        self.workers = threads if separable else 1
        self.twins = [_twin(model) for _ in range(self.workers)]
        self._parameters = list(model.parameters())
        self._twin_parameters = [list(twin.parameters()) for twin in self.twins]
        # The calling thread is the first worker. Each thread has a number of cores of its own.
        self._pool = ThreadPoolExecutor(
            max(1, self.workers - 1), initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    @contextmanager
    def cores(self) -> Iterator[None]:
        """Hold the calling thread to one core, if others work beside it.

        Whole updates are to be made inside: one operation spread over all cores, such as the
        optimizer's, leaves torch's threads spinning on them for longer than it takes.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if self.workers == 1 else 1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def gradient(
        self,
        window: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        moves: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Set the parameters' `.grad` to the gradient of the window's mean cross-entropy.

        Args:
            window: The micro-batches of one update: indices into `images` and `labels`.
            images: All training images, float, shape (n, 1, height, width).
            labels: Their classes, int64, shape (n,).
            moves: How to augment each image of the window, from `data.draw_moves`.

        Returns:
            Sum of the images' losses, and number of them classified rightly; shape () each.
        """
        self._set_training(True)
        pieces = self._cut(window)
        stops = list(accumulate(map(len, pieces), initial=0))
        slices = [slice(start, stop) for start, stop in pairwise(stops)]
        draw = self._dropout_draw(stops[-1])

        def work(worker: int) -> tuple[Tensor, Tensor]:
            twin = self.twins[worker]
            loss_sum = torch.zeros((), dtype=images.dtype)
            correct = torch.zeros((), dtype=torch.int64)
            mine = slice(worker, None, self.workers)
            for piece, place in zip(pieces[mine], slices[mine], strict=True):
                inputs, targets = images[piece], labels[piece]
                if moves is not None:
                    inputs = move(inputs, moves[place])
                twin.dropout.draw = None if draw is None else draw[place]
                logits = twin(inputs)
                loss = F.cross_entropy(logits, targets, reduction="sum")
                (loss / stops[-1]).backward()
                loss_sum += loss.detach()
                correct += (logits.detach().argmax(1) == targets).sum()
            return loss_sum, correct

        loss_sums, corrects = zip(*self._each_worker(work), strict=True)
        self._collect_gradients()
        return sum(loss_sums), sum(corrects)

    def logits(self, batches: Sequence[Tensor]) -> Tensor:
        """Logits of the images in all `batches`, in their order, with the weights as they are."""
        self._set_training(False)

        def work(worker: int) -> list[Tensor]:
            twin = self.twins[worker]
            with torch.inference_mode():
                return [twin(batch) for batch in batches[worker :: self.workers]]

        by_worker = self._each_worker(work)
        return torch.cat(
            [by_worker[i % self.workers][i // self.workers] for i in range(len(batches))]
        )

    def _cut(self, window: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of a window, as equal as can be, and enough of them for all workers."""
        if not self.separable:
            return list(window)
        share = math.ceil(self.workers / len(window))
        pieces: list[Tensor] = []
        for micro_batch in window:
            count = math.ceil(math.ceil(len(micro_batch) / PIECE) / share) * share
            pieces += micro_batch.tensor_split(min(count, len(micro_batch)))
        return pieces

    def _dropout_draw(self, images: int) -> Tensor | None:
        """The window's random numbers for dropout, drawn at once: threads have no order."""
        dropout = self.model.dropout
        if dropout.p == 0:
            return None
        return dropout.drawn((images, self.model.classifier.in_features), torch.device("cpu"))

    def _each_worker(self, work: Callable[[int], Outcome]) -> list[Outcome]:
        """Call `work` with the number of each worker, each in its thread."""
        others = [self._pool.submit(work, worker) for worker in range(1, self.workers)]
        return [work(0), *(other.result() for other in others)]

    def _collect_gradients(self) -> None:
        for number, parameter in enumerate(self._parameters):
            twins = [parameters[number] for parameters in self._twin_parameters]
            # A worker without a piece, in a small last window, has no gradient.
            parameter.grad = reduce(torch.add, (t.grad for t in twins if t.grad is not None))
            for twin in twins:
                twin.grad = None

    def _set_training(self, training: bool) -> None:
        for twin in self.twins:
            if twin.training != training:
                twin.train(training)


def _twin(model: DigitCNN) -> DigitCNN:
    """A copy that shares weights and buffers with `model`, but has gradients of its own."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach())
    return copy.deepcopy(model, shared)
