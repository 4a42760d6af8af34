"""A batch too large for the GPU; on the CPU the error is injected, on CUDA the memory is cut."""

import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch

from nbutils import InputError, RunConfig, save_run, train, train_many, training
from nbutils.studies.record import read_record

TINY = RunConfig(batch_size=96, accumulation_steps=2, epochs=2, device="cpu")  # for speed


@pytest.fixture
def room(monkeypatch):
    """Lets batches of so many images through, from the second update of an epoch on."""

    def set_room(images):
        update = training.Run._update

        def checked(run, window):
            if run.updates and max(map(len, window)) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            update(run, window)

        monkeypatch.setattr(training.Run, "_update", checked)

    return set_room


@pytest.mark.parametrize("engine", ["eager", "pieces"])
@pytest.mark.parametrize("settings", [{}, {"norm": "none", "augment": True, "optimizer": "sgd"}])
def test_a_split_run_is_bitwise_that_of_the_smaller_batch(
    few_digits, room, tmp_path, engine, settings
):
    config = replace(TINY, **settings)
    smaller = replace(config, batch_size=24, accumulation_steps=8)
    expected = train(smaller, few_digits, progress=False, engine=engine)
    room(30)
    with pytest.warns(UserWarning, match="does not fit") as told:
        result = train(
            config, few_digits, progress=False, engine=engine, on_oom="split", log_folder=tmp_path
        )
    assert [str(warning.message) for warning in told] == [
        "a batch of 96 images does not fit the memory of cpu: the run begins anew, with batches "
        "of 48 and 4 accumulation steps",
        "a batch of 48 images does not fit the memory of cpu: the run begins anew, with batches "
        "of 24 and 8 accumulation steps",
    ]
    columns = [name for name in result.history if name != "seconds"]
    pd.testing.assert_frame_equal(
        result.history[columns], expected.history[columns], check_exact=True
    )
    assert torch.equal(result.predictions, expected.predictions)
    assert (result.config, result.micro_batch) == (config, 24)
    record = read_record(save_run(result, tmp_path / "out"))
    assert (record.micro_batch, record.config["batch_size"]) == (24, 96)


def test_a_run_that_fits_is_left_alone(few_digits, room):
    room(96)
    result = train(TINY, few_digits, progress=False, on_oom="split")
    assert result.micro_batch == 96


def test_a_split_run_goes_on_from_its_checkpoint(few_digits, room, tmp_path, monkeypatch):
    room(50)
    with pytest.warns(UserWarning, match="the run begins anew"):
        whole = train(TINY, few_digits, progress=False, on_oom="split", log_folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the full batch is not tried again
        again = train(TINY, few_digits, progress=False, on_oom="split", log_folder=tmp_path)
    assert again.micro_batch == 48
    # Nothing was trained anew: even the clock's readings are those of the checkpoint.
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)


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
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("norm", ["batch", "ghost"])
def test_batches_whose_images_see_each_other_are_not_split(few_digits, norm):
    with pytest.raises(InputError, match=f"on_oom = 'split', but with norm = '{norm}' each image"):
        train(replace(TINY, norm=norm), few_digits, on_oom="split")


TOGETHER = [TINY, replace(TINY, batch_size=40), replace(TINY, seed=1)]


def assert_cut(results, sizes, data):
    """That `TOGETHER` was trained with these micro-batches, each run as if alone."""
    assert [result.micro_batch for result in results] == sizes
    for config, size, result in zip(TOGETHER, sizes, results, strict=True):
        steps = config.effective_batch_size // size
        smaller = replace(config, batch_size=size, accumulation_steps=steps)
        assert torch.equal(result.predictions, train(smaller, data, progress=False).predictions)


@pytest.mark.filterwarnings("ignore:a batch of")
def test_of_several_runs_one_after_the_other_each_is_split_as_it_needs(few_digits, room):
    room(40)
    results = train_many(TOGETHER, few_digits, progress=False, on_oom="split")
    assert_cut(results, [24, 40, 24], few_digits)


def test_of_runs_that_share_a_gpu_the_largest_batches_are_split(few_digits, room):
    room(30)
    runs = training._prepared(TOGETHER, few_digits, "auto", "split")
    with pytest.warns(UserWarning, match="does not fit") as told:
        results = training._train_within_memory(runs, progress=False, on_oom="split")
    assert [str(warning.message).partition(":")[0] for warning in told] == [
        f"a batch of {size} images does not fit the memory of cpu, which 3 runs share"
        for size in (96, 96, 48, 48, 40)
    ]
    assert_cut(results, [24, 20, 24], few_digits)


def test_an_unknown_answer_is_refused(few_digits):
    with pytest.raises(InputError, match=r"no on_oom 'spilt'; did you mean 'split'\?"):
        train(TINY, few_digits, on_oom="spilt")
    with pytest.raises(InputError, match="no on_oom 'spilt'"):
        train_many([TINY], few_digits, on_oom="spilt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["eager", "cuda-graph"])
def test_on_cuda_a_batch_too_large_is_split(digits, engine):
    config = replace(TINY, batch_size=3600, accumulation_steps=1, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.45e9 / total)
    try:
        with pytest.raises(InputError, match="does not fit the memory of cuda; take batches of"):
            train(config, digits, progress=False, engine=engine)
        with pytest.warns(UserWarning, match="the run begins anew"):
            result = train(config, digits, progress=False, engine=engine, on_oom="split")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    smaller = replace(
        config,
        batch_size=result.micro_batch,
        accumulation_steps=3600 // result.micro_batch,
    )
    expected = train(smaller, digits, progress=False, engine=engine)
    assert torch.equal(result.predictions, expected.predictions)
    assert result.history["train_loss"].equals(expected.history["train_loss"])
