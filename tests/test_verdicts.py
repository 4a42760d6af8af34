"""Verdicts on made-up runs in which the truth is known."""

import pandas as pd
import pytest

from nbutils.verdicts import Effect, effect, verdicts

SIZES = ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (128, 8))
NOISE = (-0.0002, 0.0001, 0.0003, -0.0001, -0.0001)  # of five seeds, mean 0


def study(accuracy, epochs_needed=lambda size: 1, seeds=5, norm="group"):
    """Runs whose final accuracy is `accuracy(batch_size, steps)`, give or take the seed."""
    rows = []
    for batch_size, steps in SIZES:
        for seed in range(seeds):
            # The seeds' noise differs between settings: each is shifted along.
            noise = NOISE[(seed + batch_size.bit_length() + steps) % len(NOISE)]
            final = accuracy(batch_size, steps) + noise
            late = epochs_needed(batch_size) + seed % 2
            for epoch in range(1, 9):
                at = final if epoch == 8 else 0.991 if epoch >= late else 0.98
                rows.append(
                    {
                        "run_id": f"{norm}-{batch_size}-{steps}-{seed}",
                        "batch_size": batch_size,
                        "accumulation_steps": steps,
                        "seed": seed,
                        "norm": norm,
                        "epoch": epoch,
                        "updates": epoch * 54_000 // (batch_size * steps),
                        "validation_accuracy": at,
                        "test_accuracy": at,
                    }
                )
    return pd.DataFrame(rows)


def costs(memory=lambda batch_size, steps: batch_size, repeats=3):
    """Measurements that need `memory(batch_size, steps)`, give or take a percent."""
    rows = [
        {
            "batch_size": batch_size,
            "accumulation_steps": steps,
            "repeat": repeat,
            "peak_memory": memory(batch_size, steps) * (1 + repeat / 100),
            "seconds_per_update": batch_size * steps,
            "device": "cpu",
        }
        for batch_size, steps in (*SIZES, (32, 32))
        for repeat in range(repeats)
    ]
    return pd.DataFrame(rows)


def verdict(number, runs, normalisation=None):
    if normalisation is None:
        normalisation = study(lambda size, steps: 0.99, norm="batch")
    return verdicts(runs, normalisation, costs())["verdict"][number]


def rising(size, steps):
    return 0.985 + 0.001 * (size * steps).bit_length()


def falling(size, steps):
    return 0.999 - 0.001 * (size * steps).bit_length()


def level(size, steps):
    return 0.99


def test_an_effect_has_an_interval_from_two_seeds_on():
    assert effect(pd.Series([0.1, 0.3, None])).seeds == 2
    assert str(effect(pd.Series([0.01]))) == "+1.000 points (n = 1: no interval)"
    assert str(Effect(0.01, 0.005, 0.015, 4)) == "+1.000 points (+0.500 to +1.500, n = 4)"


@pytest.mark.parametrize(
    ("number", "accuracy", "expected"),
    [
        (1, rising, "holds"),
        (1, falling, "fails: it falls"),
        (1, level, "fails: it does not change"),
        (2, level, "within 0.1 points; best choice not decidable"),
        (2, rising, "fails: not within 0.1 points, but 1024, 8 x 128 is ahead"),
        (4, falling, "holds"),
        (4, rising, "fails"),
        (4, level, "fails"),
        (5, level, "holds with GroupNorm"),
        (5, lambda size, steps: 0.99 - 0.005 * (steps > 1), "fails"),
    ],
)
def test_the_truth_is_found(number, accuracy, expected):
    assert verdict(number, study(accuracy)).startswith(expected)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_seed_decides_nothing(number):
    assert "not decidable" in verdict(number, study(falling, seeds=1))


def test_convergence_is_counted_in_epochs_and_in_updates():
    slower = study(level, epochs_needed=lambda size: 1 + size // 256)
    assert verdict(3, slower).startswith("holds only if counted in epochs")
    assert verdict(3, study(level)) == "not decidable from this"


@pytest.mark.parametrize(
    ("harm", "expected"), [(0.0, "GroupNorm is not needed here"), (0.004, "harmful here")]
)
def test_what_small_pieces_do_to_batch_norm(harm, expected):
    normalisation = study(lambda size, steps: 0.99 - harm * (steps == 8), norm="batch")
    normalisation = pd.concat([normalisation, study(rising, norm="group")])
    normalisation = normalisation.query("batch_size * accumulation_steps == 1024")
    found = verdict(6, study(level), normalisation)
    assert expected in found


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (lambda size, steps: size, "holds"),
        (lambda size, steps: 4200 + size, "fails"),  # the weights outweigh the activations
        (lambda size, steps: size * steps, "fails"),
        (lambda size, steps: size * (1.24 if steps > 1 else 1), "not decidable"),
    ],
)
def test_whether_accumulation_fits_a_large_batch_into_little_memory(memory, expected):
    noisy = costs(memory)
    # Accumulated settings vary by a percent more a repeat than the others.
    cut = noisy["accumulation_steps"] > 1
    noisy.loc[cut, "peak_memory"] *= 1 + noisy["repeat"] / 100
    runs, normalisation = study(level), study(level, norm="batch")
    row = verdicts(runs, normalisation, noisy).loc[8]
    assert row["verdict"].startswith(expected)
    assert row["verdict"].endswith("measured on: cpu")
    assert "n = 3" in row["these runs show"]


def test_there_is_a_row_a_claim():
    table = verdicts(study(level), study(level, norm="batch"), costs())
    assert list(table.index) == list(range(1, 9))
    assert list(table.columns) == ["claim", "these runs show", "verdict"]
