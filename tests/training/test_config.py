import math
from enum import Enum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbutils import InputError, RunConfig

configs = st.builds(
    RunConfig,
    dataset=st.sampled_from(["mnist-5k", "fashion-mnist", "kaggle:../../somewhere"]),
    batch_size=st.integers(1, 2048),
    accumulation_steps=st.integers(1, 64),
    epochs=st.integers(1, 100),
    learning_rate=st.floats(1e-6, 10),
    norm=st.sampled_from(["batch", "ghost", "group", "none"]),
    dropout=st.floats(0, 0.9),
    augment=st.booleans(),
    last_window=st.sampled_from(["step", "drop"]),
    seed=st.integers(0, 2**63 - 1),
)


@given(configs)
def test_round_trip_through_a_dict(config):
    assert RunConfig.from_dict(config.to_dict()) == config


@given(configs, configs)
def test_run_id_is_unique_to_the_settings_and_safe_as_a_folder_name(one, other):
    assert (one.run_id == other.run_id) == (one == other)
    assert not set(one.run_id) & set("/\\. \n")


def test_numbers_of_other_libraries_become_plain_ones():
    config = RunConfig(batch_size=np.int64(32), learning_rate=np.float64(0.5), dropout=0)
    assert type(config.batch_size) is int
    assert type(config.learning_rate) is float
    assert type(config.dropout) is float
    assert RunConfig(norm=Enum("Norms", {"GROUP": "group"}, type=str)["GROUP"]) == RunConfig()
    with pytest.raises(InputError, match="dropout"):
        RunConfig(dropout=np.longdouble("0.99999999999999999999"))  # 1 as a float
    with pytest.raises(InputError, match="learning_rate"):
        RunConfig(learning_rate=10**400)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0, but it must be a whole number >= 1"),
        ({"batch_size": 128.0}, "batch_size = 128.0, but it must be a whole number"),
        ({"batch_size": True}, "batch_size = True, but it must be a whole number"),
        ({"batch_size": "128"}, "batch_size = '128', .* it is text"),
        ({"batch_size": None}, "batch_size = None"),
        ({"batch_size": [32, 64]}, "batch_size = \\[32, 64\\]"),
        ({"accumulation_steps": 0}, "accumulation_steps = 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0, but it must be a number > 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan, but it must be .* > 0, and finite"),
        ({"weight_decay": math.inf}, "weight_decay = inf, but it must be .* >= 0, and finite"),
        ({"learning_rate": "1e-3"}, "in YAML write 1.0e-3, not 1e-3"),
        ({"weight_decay": -1e-4}, "weight_decay = -0.0001"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum = 1.0, but it must be a number in"),
        ({"momentum": 0.9}, 'momentum = 0.9, but it must be a setting of "sgd"'),
        ({"optimizer": "adamm"}, "optimizer = 'adamm', but it must be one of: adam, sgd"),
        ({"schedule": "cosine"}, "schedule = 'cosine'"),
        ({"norm": None}, "norm = None, but it must be one of: batch, ghost, group, none"),
        ({"dropout": 1}, "dropout = 1, but it must be a number in"),
        ({"augment": "true"}, "augment = 'true', .* with papermill write True"),
        ({"augment": 1}, "augment = 1, but it must be true or false"),
        ({"last_window": "carry"}, "last_window = 'carry'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "seed = 9223372036854775808"),
        ({"device": "gpu"}, "device = 'gpu', but it must be"),
        ({"precision": "float16"}, "precision = 'float16'"),
        ({"dataset": " "}, "dataset = ' '"),
        ({"batchsize": 32}, "no setting 'batchsize'; did you mean 'batch_size'?"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        RunConfig.from_dict(settings)
