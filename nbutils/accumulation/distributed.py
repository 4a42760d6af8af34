"""`DistributedDataParallel`: one synchronisation per window, and every image of every rank weighs
the same, also if ranks hold unequal numbers of images.

Any module of the model may be a `DistributedDataParallel`. Gradients of the parameters outside of
these parts are averaged over the ranks too; such parameters must start equal on all ranks.

What cannot work:

- Unequal numbers of updates: a rank that makes more waits for the others until the process group's
  timeout. An empty window, and with `update=` also a wrong number, is refused on all ranks at once.
- `with model.join():`, which is refused, and `DistributedDataParallel(static_graph=True)`, where
  torch fails in the first window.
- Parameters that the losses reach but the model does not hold: they are not averaged.
- An error of one rank, such as running out of memory: the others wait for it.
- Passing the plain model inside of the module that `losses` calls: its ranks are not seen.
"""

from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbutils.accumulation.batch import place


class Ranks:
    """The `number` of processes that train a model together; 1 if it is not distributed."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        bases = {base.__name__ for module in modules for base in type(module).__mro__}
        if bases & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(
                "FullyShardedDataParallel is not supported, only DistributedDataParallel"
            )
        self._model, self.number = model, 1
        self._parts = [m for m in modules if isinstance(m, DistributedDataParallel)]
        if not self._parts:
            return
        self._group = self._parts[0].process_group
        self.number = dist.get_world_size(self._group)
        if any(part.process_group is not self._group for part in self._parts):
            raise ValueError("parts of the model are in different process groups")
        if any(part._join_config.enable for part in self._parts):
            raise ValueError(
                "the model is in a join() context; instead give every rank as many windows, as "
                "DistributedSampler does"
            )

    def no_sync(self) -> ExitStack:
        """A context in which backward passes do not synchronise gradients."""
        stack = ExitStack()
        for part in self._parts:
            stack.enter_context(part.no_sync())
        return stack

    def total_weight(self, weights: list[float], update: int | None) -> float:
        """The weight of the windows of all ranks; NaN if a rank does not know that of its own.

        All ranks see the same numbers, so either all go on or all refuse windows that do not match.
        """
        told = self._gather([len(weights), sum(weights), -1 if update is None else update])
        steps, sums, updates = zip(*told, strict=True)
        if 0 in steps:
            whose = f" of rank {steps.index(0)}" if len(told) > 1 else ""
            raise ValueError(f"{place(update)}the window{whose} is empty")
        if len(set(updates)) > 1:
            raise ValueError(
                f"the ranks are at updates {[int(each) for each in updates]}; give every rank the "
                f"same number of windows"
            )
        if sum(sums) == 0:
            raise ValueError(f"{place(update)}the losses of the window weigh nothing")
        return sum(sums)

    @torch.no_grad()
    def average_parameters_outside(self) -> None:
        """Average the gradients of parameters that no `DistributedDataParallel` holds."""
        if not self._parts:
            return
        inside = {id(p) for part in self._parts for p in part.parameters()}
        outside = [p for p in self._model.parameters() if p.requires_grad and id(p) not in inside]
        used = zip(*self._gather([p.grad is not None for p in outside]), strict=True)
        for parameter, on_ranks in zip(outside, used, strict=True):
            if any(on_ranks):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient, group=self._group)
                parameter.grad = gradient.div_(self.number)

    def _gather(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, in the order of ranks."""
        if not (self._parts and values):
            return [values]
        device = next(self._parts[0].parameters()).device
        mine = torch.tensor(values, dtype=torch.float64, device=device)
        theirs = [torch.empty_like(mine) for _ in range(self.number)]
        try:
            dist.all_gather(theirs, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "another rank did not answer: it failed, or it has fewer windows; every rank must "
                "call accumulate_gradient equally often"
            ) from error
        return torch.stack(theirs).tolist()
