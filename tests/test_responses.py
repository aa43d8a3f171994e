"""What models say of responses, as (B, R) tensors, against one row at a time and PyTorch's ops."""

import random

import torch
from conftest import random_model

from nanodistill import responses
from nanodistill.model import ScalarModel


# Prompts of 2, 1 and 3 tokens; the numbers after them are responses.
ROWS, COUNTS = [[5, 6, 7, 3], [8, 3], [9, 10, 11, 12, 13, 3]], [2, 1, 3]


def all_of_them():
    return responses.batch(ROWS, COUNTS, range(3), "cpu")


def test_mask_and_grid_by_hand():
    assert responses.mask(COUNTS).tolist() == [[True, True, False], [True, False, False],
                                               [True, True, True]]
    flat = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert all_of_them().grid(flat).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]


def test_a_batch_of_some_responses_by_hand():
    batch = responses.batch(ROWS, COUNTS, [1, 0], "cpu")
    # Without the last tokens: 8 | 5 6 7. The response tokens 3 | 7 3 follow on 8 | 6 7.
    assert batch.packed.ids.tolist() == [8, 5, 6, 7] and batch.packed.last.tolist() == [0, 2, 3]
    assert batch.targets.tolist() == [3, 7, 3] and batch.at.tolist() == [1, 0]
    # As wide as the longest response of all, which is not among these.
    assert batch.grid(torch.tensor([1.0, 2, 3])).tolist() == [[1, 0, 0], [2, 3, 0]]


def test_logprobs_and_entropy_are_of_each_response_token_at_the_temperature():
    model = random_model()
    with torch.no_grad():
        chosen, entropy = responses.logprobs(model, all_of_them(), 0.7)
        for b, (row, n) in enumerate(zip(ROWS, COUNTS)):
            logits = model(torch.tensor([row]))[0, -n - 1:-1] / 0.7
            expected = torch.distributions.Categorical(logits=logits)
            torch.testing.assert_close(chosen[b, :n], expected.log_prob(torch.tensor(row[-n:])))
            torch.testing.assert_close(entropy[b, :n], expected.entropy())
    outside = ~responses.mask(COUNTS)
    assert not chosen[outside].any() and not entropy[outside].any()


def test_values_are_what_is_expected_before_each_response_token():
    model = random_model(ScalarModel)
    with torch.no_grad():
        values = responses.values(model, all_of_them(), torch.sigmoid)
        for b, (row, n) in enumerate(zip(ROWS, COUNTS)):
            torch.testing.assert_close(values[b, :n],
                                       model(torch.tensor([row]))[0, -n - 1:-1].sigmoid())
    assert not values[~responses.mask(COUNTS)].any()


def test_each_epoch_uses_every_response_once_in_another_order():
    lists = list(responses.minibatches(12, 4, 2, random.Random(0)))
    assert [len(x) for x in lists] == [4] * 6
    first, second = sum(lists[:3], []), sum(lists[3:], [])
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert sorted(first) not in (first, second)
    assert lists == list(responses.minibatches(12, 4, 2, random.Random(0)))


def test_rows_of_like_length_are_taken_together():
    assert list(responses.alike([2, 1, 0], ROWS, 2)) == [([1, 0], 1), ([2], 1)]
