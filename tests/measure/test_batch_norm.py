import torch

from nbutils.measure.batch_norm import running_statistics_error


def test_averages_of_larger_micro_batches_are_closer_to_the_truth(few_digits):
    state = torch.get_rng_state()
    errors = running_statistics_error(few_digits, [300, 60, 6])
    assert errors[300] < 1e-4  # every micro-batch is the whole training set
    assert errors[300] < errors[60] < errors[6]
    assert running_statistics_error(few_digits, [300]) == {300: errors[300]}
    assert torch.equal(torch.get_rng_state(), state)
