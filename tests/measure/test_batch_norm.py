import torch

from nbutils.measure.batch_norm import running_statistics_error


def test_averages_of_larger_micro_batches_are_closer_to_the_truth(few_digits):
    state = torch.get_rng_state()
    data = few_digits.subset(100)
    errors = running_statistics_error(data, [100, 30, 5])
    assert errors[100] < 1e-4  # every micro-batch is the whole training set
    assert errors[100] < errors[30] < errors[5]
    assert running_statistics_error(data, [100]) == {100: errors[100]}
    assert torch.equal(torch.get_rng_state(), state)
