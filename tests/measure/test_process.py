"""Work in a process of its own, and the memory that is counted there."""

import os
import signal

import pytest
import torch
from measured_models import out_of_cuda_memory

from nbutils.errors import InputError
from nbutils.measure import memory
from nbutils.measure.memory import format_memory, free_memory, parse_memory
from nbutils.measure.process import OutOfMemory, in_own_process

MEGABYTE = 10**6


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: torch.empty(2**58), OutOfMemory, "allocate"),
        (out_of_cuda_memory, OutOfMemory, "CUDA out of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OutOfMemory, "killed"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), RuntimeError, "SIGTERM"),
        (lambda: os._exit(3), RuntimeError, "exit status 3 without a result"),
        (lambda: [][1], InputError, r"IndexError.*test_process.py, line \d+: .*lambda: \[\]\[1\]"),
    ],
)
def test_each_end_without_a_result_is_its_own_error(work, error, message):
    with pytest.raises(error, match=message):
        in_own_process(work)


def test_the_peak_is_of_what_came_after_its_beginning():
    def work():
        device = torch.device("cpu")
        torch.ones(50 * MEGABYTE)
        before = memory.begin_peak(device)
        torch.ones(5 * MEGABYTE)
        return memory.peak(device) - before

    assert 19 * MEGABYTE < in_own_process(work) < 40 * MEGABYTE


def test_the_peak_on_cuda_is_what_is_reserved_beyond_what_was_before(monkeypatch):
    """On stand-ins: no GPU is needed, and none was used."""
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 100)
    device = torch.device("cuda:0")
    assert memory.begin_peak(device) == 30
    assert memory.peak(device) == 100
    assert done == ["emptied", "reset"]


def test_free_memory_is_less_than_what_is_installed():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert MEGABYTE < free_memory("cpu") <= installed


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 2 gb ", 2 * 10**9),
        ("64KiB", 65_536),
        ("1TB", 10**12),
        ("12B", 12),
    ],
)
def test_a_memory_budget_is_read(text, size):
    assert parse_memory(text) == size
    assert parse_memory(format_memory(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    "text", ["", "2", "GB", "2 gigs", "-2GB", "0GB", "0.4B", "1e3MB", "2,5GB", "nanGB"]
)
def test_a_text_that_is_no_memory_is_named(text):
    with pytest.raises(InputError, match=f"memory {text!r}"):
        parse_memory(text)
