"""Rows that stand for many: exact while there is room, unbiased and close beyond."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apoptosis.errors import ShapeError
from apoptosis.numerics.sketch import Sketch, row_sizes, sketched


def test_as_many_rows_as_there_is_room_for_are_kept_exactly():
    rows = torch.randn(40, 7)
    sketch = Sketch(7, size=64)
    sketch.add(rows[:15], torch.Generator().manual_seed(1))
    sketch.add(rows[15:], torch.Generator().manual_seed(2))
    found = sketch.rows()
    assert found.shape == (40, 7)
    torch.testing.assert_close(found.T @ found, rows.T @ rows)
    assert Sketch(3).rows().shape == (0, 3)


@pytest.mark.parametrize("pieces", [1, 7])
def test_energies_of_many_rows_are_close(pieces):
    torch.manual_seed(0)
    rows = torch.randn(5000, 6) * torch.rand(5000, 1) ** 4  # of very unequal size
    sketch, draws = Sketch(6, size=512), torch.Generator().manual_seed(0)
    for piece in rows.chunk(pieces):
        sketch.add(piece, draws)
    found = sketch.rows()
    assert found.shape == (512, 6)
    ratio = found.square().sum(0) / rows.square().sum(0)
    assert float((ratio - 1).abs().max()) < 5 * (2 / 512) ** 0.5


def test_it_goes_on_where_its_state_stopped():
    rows = torch.randn(300, 4)
    whole, first = Sketch(4, size=32), Sketch(4, size=32)
    draws = torch.Generator().manual_seed(3)
    whole.add(rows[:100], draws)
    whole.add(rows[100:], draws)
    draws = torch.Generator().manual_seed(3)
    first.add(rows[:100], draws)
    second = Sketch(4, size=32)
    second.load_state_dict(first.state_dict())
    second.add(rows[100:], draws)
    assert torch.equal(second.rows(), whole.rows())
    assert second.num_rows == 300


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="expected"):
        Sketch(4).add(torch.zeros(3, 5), torch.Generator())
    with pytest.raises(ShapeError, match="state of"):
        Sketch(4).load_state_dict(Sketch(5).state_dict())


def test_a_matrix_at_hand():
    matrix = torch.randn(300, 5)
    assert sketched(matrix, 16, 0).shape == (16, 5)
    assert torch.equal(sketched(matrix, 16, 0), sketched(matrix, 16, 0))


@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1e-42, 1e-25, -1e-25, 1.0, 1e25, 3e38, float("inf"), float("nan")]),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_rows_are_zero_or_not_finite_as_sums_of_absolute_values_say(values, dtype):
    rows = torch.tensor(values, dtype=torch.float64).to(dtype)
    plain = rows.to(torch.float64 if dtype == torch.float64 else torch.float32).abs().sum(1)
    found = row_sizes(rows)
    assert torch.equal(found.eq(0), plain.eq(0))
    assert torch.equal(found.isfinite(), plain.isfinite())
