"""A batch too large for the memory; on the CPU the error is injected, on CUDA memory is cut."""

import importlib
import traceback
import warnings
from dataclasses import replace

import pytest
import torch
from outcomes import assert_same_result

from nbutils import InputError, RunConfig, train, train_many
from nbutils.accumulation.out_of_memory import is_out_of_memory
from nbutils.training.out_of_memory import run_within_memory

TINY = RunConfig(batch_size=96, accumulation_steps=2, epochs=2, device="cpu")  # for speed
train_module = importlib.import_module("nbutils.training.train")


@pytest.fixture
def room(monkeypatch):
    """Lets micro-batches of up to this many images through; larger ones run out of memory."""

    def set_room(images):
        accumulate = train_module.accumulate_gradient

        def checked(model, window, losses, **options):
            if max(map(len, window)) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return accumulate(model, window, losses, **options)

        monkeypatch.setattr(train_module, "accumulate_gradient", checked)

    return set_room


def test_a_split_run_is_bitwise_that_of_the_smaller_batch(few_digits, room, tmp_path):
    smaller = replace(TINY, batch_size=24, accumulation_steps=8)
    expected = train(smaller, few_digits, progress=False)
    room(30)
    with pytest.warns(UserWarning, match="does not fit") as told:
        result = train(TINY, few_digits, progress=False, on_oom="split", log_folder=tmp_path)
    assert [str(warning.message) for warning in told] == [
        "a batch of 96 images does not fit the memory of cpu: the run starts again, with batches "
        "of 48 and 4 accumulation steps",
        "a batch of 48 images does not fit the memory of cpu: the run starts again, with batches "
        "of 24 and 8 accumulation steps",
    ]
    assert_same_result(result, expected)
    assert (result.config, result.micro_batch) == (TINY, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # resumed, the full batch is not tried again
        again = train(TINY, few_digits, progress=False, on_oom="split", log_folder=tmp_path)
    assert_same_result(again, result)


@pytest.mark.parametrize(
    ("settings", "on_oom", "message"),
    [
        (
            {},
            "stop",
            "batch_size = 96: a batch of 96 images does not fit the memory of cpu; take batches of "
            "48 and 4 accumulation steps, the same 192 images per update, or let on_oom = 'split' "
            "do so",
        ),
        ({"norm": "batch"}, "stop", "192 images per update, which with norm = 'batch' trains diff"),
        ({"batch_size": 75}, "stop", "75 cannot be halved evenly; choose a smaller batch_size"),
        ({"batch_size": 150, "accumulation_steps": 1}, "split", "75 cannot be halved evenly"),
    ],
)
@pytest.mark.filterwarnings("ignore:a batch of 150")
def test_a_batch_that_cannot_be_split_stops_with_advice(
    few_digits, room, settings, on_oom, message
):
    room(30)
    with pytest.raises(InputError) as error:
        train(replace(TINY, **settings), few_digits, progress=False, on_oom=on_oom)
    assert message in str(error.value)
    cause = error.value.__cause__
    assert isinstance(cause, torch.OutOfMemoryError)
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    assert not any("model" in frame.f_locals for frame in frames), "it holds the failed attempt"


@pytest.mark.filterwarnings("ignore:a batch of")
def test_each_run_is_split_as_it_needs(few_digits, room):
    room(40)
    configs = [TINY, replace(TINY, batch_size=40)]
    results = train_many(configs, few_digits, progress=False, on_oom="split")
    assert [result.config for result in results] == configs
    assert [result.micro_batch for result in results] == [24, 40]


def test_of_runs_that_share_a_device_the_largest_batches_are_split():
    tried = []

    def attempt(_, sizes):
        tried.append(list(sizes))
        if sum(sizes) > 120:
            raise torch.OutOfMemoryError
        return []

    configs, cpu = [TINY, replace(TINY, batch_size=40), TINY], torch.device("cpu")
    with pytest.warns(UserWarning, match="the memory of cpu, which 3 runs share"):
        run_within_memory(attempt, configs, cpu, "split", None)
    assert tried == [[96, 40, 96], [48, 40, 48], [24, 40, 24]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("the text is out of memory"), False),
    ],
)
def test_out_of_memory_is_known_under_all_its_names(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_cuda_a_batch_too_large_is_split(digits, cuda_graph):
    config = replace(TINY, batch_size=3600, accumulation_steps=1, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.45e9 / total)
    options = {"progress": False, "cuda_graph": cuda_graph}
    try:
        with pytest.raises(InputError, match="does not fit the memory of cuda; take batches of"):
            train(config, digits, **options)
        with pytest.warns(UserWarning, match="the run starts again"):
            result = train(config, digits, **options, on_oom="split")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    steps = 3600 // result.micro_batch
    smaller = replace(config, batch_size=result.micro_batch, accumulation_steps=steps)
    assert torch.equal(result.predictions, train(smaller, digits, **options).predictions)
