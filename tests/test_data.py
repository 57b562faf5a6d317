import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, strategies as st

import bayesnn
from bayesnn.data import (
    BayesnnWarning,
    Data,
    as_float,
    check_counts,
    check_inputs,
    check_labels,
    check_targets,
    minibatch,
    standardisation,
)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], dtype=np.int32),
        np.array([[1, 2], [3, 4]], dtype=np.float16),
        np.array([[1, 2], [3, 4]], dtype=np.uint8),
        torch.tensor([[1, 2], [3, 4]]),
        pandas.DataFrame({"a": [1, 3], "b": [2.0, 4.0]}),
    ],
)
def test_numbers_of_every_kind_become_floats(values):
    tensor = check_inputs(values)
    assert tensor.is_floating_point() and tensor.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_keep_their_dtype(dtype):
    assert as_float(torch.ones(2, dtype=dtype), "X").dtype == dtype


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        np.array(["a"]),
        None,
        {"a": 1},
        object(),
        torch.ones(2, dtype=torch.complex64),
        np.array([1, "a", None]),
    ],
)
def test_what_is_no_number_is_a_type_error_that_names_the_argument(values):
    with pytest.raises(TypeError, match="inputs must"):
        as_float(values, "inputs")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad):
    with pytest.raises(ValueError, match="X must be finite, found 1 NaN or infinite"):
        check_inputs([[0.0], [bad]])


def test_numbers_too_large_for_the_dtype_are_refused():
    with pytest.raises(ValueError, match="Y must be finite"):
        check_targets(torch.tensor([1e300], dtype=torch.float64), 1, like=torch.ones(1, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0), (2, 3, 4)])
def test_shapes_of_inputs(shape):
    with pytest.raises(ValueError, match="X must have"):
        check_inputs(torch.ones(shape))


def test_batches_at_prediction_only():
    assert check_inputs(torch.ones(2, 3, 4), batched=True).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="5 columns as at fit, found 4"):
        check_inputs(torch.ones(2, 3, 4), num_features=5, batched=True)


def test_targets():
    assert check_targets([1, 2, 3], 3).shape == (3, 1)
    assert check_targets(np.ones((3, 2)), 3).shape == (3, 2)
    for wrong in (torch.ones(()), torch.ones(3, 0), torch.ones(3, 1, 1)):
        with pytest.raises(ValueError, match="shape"):
            check_targets(wrong, 3)
    with pytest.raises(ValueError, match="X has 4, Y has 3"):
        check_targets([1.0, 2.0, 3.0], 4)


def test_labels():
    for given_labels in ([0, 2, 1], [0.0, 2.0, 1.0], np.array([[0], [2], [1]]), [False, True, True]):
        labels = check_labels(given_labels, 3, 3)
        assert labels.dtype == torch.int64 and labels.shape == (3, 1)
    for wrong, message in (
        ([0, 3, 1], "labels 0 … 2, found labels from 0 to 3"),
        ([0, -1, 1], "found labels from -1"),
        ([0, 0.5, 1], "whole numbers"),
        (np.eye(3), "one column"),
        ([0, 1], "one row for each row"),
    ):
        with pytest.raises(ValueError, match=message):
            check_labels(wrong, 3, 3)


def test_counts():
    assert check_counts([0, 1, 7], 3).squeeze(-1).tolist() == [0, 1, 7]
    for wrong in ([-1, 0, 0], [0.5, 0, 0]):
        with pytest.raises(ValueError, match="counts"):
            check_counts(wrong, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardisation_has_mean_0_and_variance_1_and_inverts(dtype):
    values = torch.randn(50, 3, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e4], dtype=dtype) + 7
    scaling = standardisation(values, "X")
    standardised = scaling.standardise(values)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3, dtype=dtype), atol=1e-2, rtol=0)
    torch.testing.assert_close(standardised.std(0), torch.ones(3, dtype=dtype), atol=1e-2, rtol=0)
    torch.testing.assert_close(scaling.loc + scaling.scale * standardised, values)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e25, 1e37])
def test_standardisation_of_numbers_whose_squares_leave_float32(magnitude):
    values = torch.tensor([[1.0], [2.0], [3.0]]) * magnitude
    torch.testing.assert_close(standardisation(values, "X").standardise(values), torch.tensor([[-1.0], [0.0], [1.0]]))


def test_standardisation_of_numbers_whose_squares_leave_float64():
    for magnitude in (1e-310, 1e-200, 1e160, 1e307):
        values = torch.tensor([[1.0], [2.0], [3.0]]).double() * magnitude
        expected = torch.tensor([[-1.0], [0.0], [1.0]]).double()
        torch.testing.assert_close(standardisation(values, "X").standardise(values), expected)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_outcomes_without_a_variance_in_their_dtype(magnitude):
    X = torch.rand(5, 1)
    with pytest.raises(ValueError, match=r"Y: its variance leaves torch.float32 .* choose other units, or float64"):
        bayesnn.NNGP(optimise=False).fit(X, X * magnitude)
    found = bayesnn.NNGP(optimise=False).fit(X.double(), X.double() * magnitude).predict(X.double())
    assert torch.isfinite(found.variance).all() and (found.variance > 0).all()


@given(st.floats(-1e6, 1e6), st.integers(2, 300), st.sampled_from([torch.float32, torch.float64]))
def test_constant_columns_are_centred_and_reported(value, rows, dtype):
    values = torch.full((rows, 2), value, dtype=dtype)
    values[:, 1] = torch.arange(rows)
    with pytest.warns(BayesnnWarning, match=rf"X: column\(s\) \[0\] are constant over the {rows} rows"):
        scaling = standardisation(values, "X")
    assert scaling.scale[0, 0] == 1
    assert scaling.standardise(values)[:, 0].abs().max() <= 1e-5 * max(1, abs(value))


def test_one_row_is_centred():
    scaling = standardisation(torch.tensor([[3.0, -2.0]]), "X")
    assert scaling.standardise(torch.tensor([[3.0, -1.0]])).tolist() == [[0, 1]]


def test_minibatches_are_rows_without_replacement_and_fair():
    data = Data(torch.arange(10.0)[:, None], -torch.arange(10.0)[:, None])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        batch = minibatch(data, 3, generator)
        assert torch.equal(batch.X, -batch.Y) and batch.X.unique().numel() == 3
        counts[batch.X.flatten().long()] += 1
    # Each row is in a batch with probability 0.3.
    assert ((counts - 600) / (2000 * 0.3 * 0.7) ** 0.5).abs().max() < 4
    assert minibatch(data, None, generator) is data and minibatch(data, 10, generator) is data
