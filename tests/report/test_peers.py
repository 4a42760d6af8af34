from importlib.util import find_spec

import pandas as pd
import pytest

from nbutils.__main__ import main
from nbutils.report.libraries import PEERS, PEERS_FILE, observe, peers_table

COMMITTED = pd.read_csv(PEERS_FILE).set_index("library")


def test_ours_gives_the_last_window_its_true_weight():
    assert observe("this project") == {
        "library": "this project",
        "version": "",
        "updates": 42,
        "epoch": 1,
        "update": 42,
        "size": pytest.approx(1),
        "weight": pytest.approx(1 / 16),
    }


def test_the_committed_table_has_every_library():
    assert COMMITTED.index.tolist() == list(PEERS)
    assert len(peers_table()) == len(PEERS)


@pytest.mark.parametrize("name", list(PEERS)[1:])
def test_the_committed_row_is_what_the_library_does(name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it comes with the extra 'peers'")
    row = observe(name)
    for column in ("updates", "epoch", "update", "size", "weight"):
        assert row[column] == pytest.approx(COMMITTED.loc[name, column]), column


@pytest.mark.skipif(find_spec("accelerate") is not None, reason="the extra 'peers' is installed")
def test_without_the_extra_the_command_says_what_to_install(capsys):
    before = PEERS_FILE.read_bytes()
    assert main(["peers"]) == 2
    assert "pip install -e '.[peers]'" in capsys.readouterr().err
    assert PEERS_FILE.read_bytes() == before
