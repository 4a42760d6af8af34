"""Two processes under gloo, compared with one batch in one process."""

import importlib
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from nbutils.accumulation import accumulate_gradient
from nbutils.accumulation.vectors import flat_gradient

IMAGES = 10
PARTS = ([slice(0, 3), slice(3, 6), slice(6, 7)], [slice(7, 9), slice(9, 10)])
"""The micro-batches of each rank: 7 images and 3."""


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs)


def network():
    torch.manual_seed(0)
    body = nn.Linear(5, 7).double()
    body.register_buffer("seen", torch.zeros(()))  # DDP broadcasts buffers before a forward pass
    return nn.Sequential(body, nn.Tanh(), nn.Linear(7, 3).double())


def in_parts(wrap_head):
    body, tanh, head = network()
    return nn.Sequential(DistributedDataParallel(body), tanh, wrap_head(head))


MODELS = {
    "itself": lambda: DistributedDataParallel(network(), gradient_as_bucket_view=True),
    "wrapped": lambda: Wrapper(DistributedDataParallel(network())),
    "a part": lambda: in_parts(lambda head: head),
    "two parts": lambda: in_parts(DistributedDataParallel),
    "compiled": lambda: torch.compile(DistributedDataParallel(network()), backend="eager"),
}


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 5, generator=generator).double(), torch.arange(IMAGES) % 3


def losses_of(model):
    return lambda pair: F.cross_entropy(model(pair[0]), pair[1], reduction="none")


def window_of(rank):
    inputs, labels = examples()
    return [(inputs[part], labels[part]) for part in PARTS[rank]]


def message(model, window, **options):
    try:
        accumulate_gradient(model, window, losses_of(model), **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def gradients(model, rank):
    """What a window of pairs adds to a gradient of 2, and what a window of indices adds."""
    inputs, labels = examples()
    indices = [torch.arange(IMAGES)[part] for part in PARTS[rank]]
    for window, losses in (
        (window_of(rank), losses_of(model)),
        (indices, lambda chosen: losses_of(model)((inputs[chosen], labels[chosen]))),
    ):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2)
        accumulate_gradient(model, window, losses, update=0)
        yield flat_gradient(model) - 2


def synchronisations(rank):
    model, counted = DistributedDataParallel(network()), []

    def count(group, bucket):
        counted.append(1)
        return default_hooks.allreduce_hook(group, bucket)

    model.register_comm_hook(None, count)
    accumulate_gradient(model, window_of(rank), losses_of(model))
    return len(counted)


def refusals(rank):
    window = window_of(rank)
    model, other = DistributedDataParallel(network()), DistributedDataParallel(network())
    told = [message(model, window if rank else []), message(model, window, update=rank)]
    with model.join():
        told.append(message(model, window))
    dist.barrier()
    if rank == 0:  # the other rank makes no more windows
        told.append(message(other, window))
    return told


def without_labels_on_rank_1(rank):
    model = DistributedDataParallel(network())
    loss = accumulate_gradient(
        model,
        window_of(rank),
        lambda pair: (1 - rank) * losses_of(model)(pair),
        weight=lambda pair: (1 - rank) * len(pair[0]),
    )
    return loss, flat_gradient(model)


def on_rank(rank, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # a regression fails instead of waiting half an hour
    )
    seen = {name: list(gradients(MODELS[name](), rank)) for name in names}
    seen["synchronisations"] = synchronisations(rank)
    seen["no labels"] = without_labels_on_rank_1(rank)
    seen["refusals"] = refusals(rank)
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def two_ranks(folder, *names):
    importlib.import_module("torch._dynamo")  # takes seconds; forked processes then have it
    torch.multiprocessing.start_processes(
        on_rank,
        args=(str(folder), names),
        nprocs=2,
        start_method="fork" if sys.platform == "linux" else "spawn",
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def one_batch(chosen=slice(None)):
    model = network()
    inputs, labels = examples()
    F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
    return flat_gradient(model)


def test_images_of_two_ranks_weigh_the_same_wherever_ddp_is_and_refusals_reach_both(tmp_path):
    names = ["itself", "wrapped", "a part", "two parts"]
    for rank, seen in enumerate(two_ranks(tmp_path, *names)):
        for name in names:
            for gradient in seen[name]:
                torch.testing.assert_close(gradient, one_batch(), rtol=1e-12, atol=1e-14)
        assert seen["synchronisations"] == 1
        loss, gradient = seen["no labels"]
        torch.testing.assert_close(gradient, one_batch(slice(7)), rtol=1e-12, atol=1e-14)
        assert loss.isnan() == (rank == 1)
        empty, updates, join, *ended = seen["refusals"]
        assert "the window of rank 0 is empty" in empty
        assert "the ranks are at updates [0, 1]" in updates
        assert "join() context" in join
        assert all("another rank did not answer" in text for text in ended)


@pytest.mark.slow
def test_images_of_two_ranks_weigh_the_same_in_a_compiled_model(tmp_path):
    for seen in two_ranks(tmp_path, "compiled"):
        for gradient in seen["compiled"]:
            torch.testing.assert_close(gradient, one_batch(), rtol=1e-12, atol=1e-14)


def test_sharded_models_are_refused():
    class FSDPModule(nn.Linear):
        pass

    model = FSDPModule(5, 3)
    assert "only DistributedDataParallel" in message(model, [(torch.ones(2, 5), torch.arange(2))])
