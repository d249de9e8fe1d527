"""CSV files: what columns become, statistics of the training rows alone, one line for what is wrong."""

import gzip
import math

import pytest
import torch

from apoptosis.errors import ArgumentError, DataError
from apoptosis.tools.cli.app import run
from apoptosis.tools.recipes.datasets.table import load_table


def written(tmp_path, header, rows, name="t.csv"):
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


CITIES = ("A", 'B ""x""', "C, D", "")


def people(n=120):
    return [
        f'{i},{"" if i % 7 == 0 else 20 + i % 40},"{CITIES[i % 4]}",2024-01-{1 + i % 28:02d},'
        f"{3 * (i % 40)}.5,{i % 3 + 1},{('yes', 'no')[i % 2]}"
        for i in range(n)
    ]


HEAD = "id,age,city,when,price,grade,ok"


def test_columns_become_numbers_by_the_training_rows(tmp_path):
    path = written(tmp_path, HEAD, people())
    data = load_table(path, "price", validation=0.25)
    assert (data.kind, data.metric, data.num_classes) == ("values", "r2", 1)
    columns = data.about["columns"]
    assert list(columns) == ["age", "city", "when", "grade", "ok"]
    assert columns["city"]["values"] == ["", "A", 'B "x"', "C, D"]
    assert columns["ok"]["values"] == ["no", "yes"]
    assert data.shape == (2 + 4 + 1 + 1 + 2,)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [72, 24, 24]
    assert {"column 'id' is left out: it numbers the rows", "dates in 'when' are taken as a number of days"} < set(
        data.notes
    )
    x, y = data.train.between(0, len(data.train))
    missing = x[:, 1] == 1
    assert torch.equal(x[missing, 0], torch.zeros(int(missing.sum())))
    there = x[~missing, 0]
    torch.testing.assert_close(there.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(there.std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(y.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    back = y * data.about["deviation"] + data.about["mean"]
    torch.testing.assert_close(back, back.round(decimals=1), atol=1e-3, rtol=0)
    assert not math.isclose(float(data.test.between(0, 24)[0][:, 0].mean()), 0.0, abs_tol=1e-4)


def test_what_the_test_rows_hold_does_not_change_the_training_rows(tmp_path):
    one = load_table(written(tmp_path, HEAD, people()), "price")
    where = {tuple(row) for row in one.train.inputs.tolist()}
    ages = {20 + i % 40 for i in range(120)}
    assert len(where) > 1
    # a huge age in every row in turn: where it lies in a test row, the training rows are the same, bit by bit
    changed = []
    for row in range(1, 30):
        rows = people()
        cells = rows[row].split(",")
        rows[row] = ",".join([cells[0], str(max(ages) * 1000), *cells[2:]])
        other = load_table(written(tmp_path, HEAD, rows, "other.csv"), "price")
        changed.append(not torch.equal(one.train.inputs, other.train.inputs))
    assert 0 < sum(changed) < len(changed)


def test_the_split_is_the_same_every_time_and_shares_out_classes(tmp_path):
    path = written(tmp_path, HEAD, people())
    first, again = load_table(path, "grade"), load_table(path, "grade")
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(first, name).inputs, getattr(again, name).inputs)
    assert first.about["classes"] == ["1", "2", "3"]  # whole numbers that begin at 1
    assert first.test.labels.bincount().tolist() == [8, 8, 8]
    assert first.train.labels.unique().tolist() == [0, 1, 2]
    assert load_table(path, "grade", task="regression").kind == "values"
    assert load_table(path, "ok").about["classes"] == ["no", "yes"]
    assert len(load_table(path, "ok", train_rows=30).train) == 30
    assert load_table(path, "ok", drop=["city", "when", "id"]).shape == (2 + 1 + 1,)


def test_other_ways_to_write_a_table(tmp_path):
    rows = people()
    plain = load_table(written(tmp_path, HEAD, rows), "ok")
    zipped = tmp_path / "t.csv.gz"
    zipped.write_bytes(gzip.compress(("\ufeff" + "\r\n".join([HEAD, *rows, "", ""])).encode()))
    assert torch.equal(load_table(zipped, "ok").train.inputs, plain.train.inputs)
    german = [f"{i % 10},{i % 5};{('x', 'y')[i % 2]};{i}" for i in range(60)]
    data = load_table(written(tmp_path, "a;b;c", german), "b")
    assert data.shape == (1,)
    assert "in 'a' the comma is the decimal sign" in data.notes
    gaps = [row if i % 5 else row.rsplit(",", 1)[0] + ",NA" for i, row in enumerate(rows)]
    assert "24 rows without a value in 'ok' are left out" in load_table(written(tmp_path, HEAD, gaps), "ok").notes


def many(cell, other="1", n=40):
    return [f"{other if i else cell},{('x', 'y')[i % 2]},{i * i % 13}" for i in range(n)]


@pytest.mark.parametrize(
    ("header", "rows", "label", "what"),
    [
        ("a,b,c", many("12a", "7"), "b", "line 2: '12a' in column 'a' is not a number, as 39 other values are"),
        ("a,b,c", many("inf", "7"), "b", "'inf' in column 'a' is not a number"),
        ("a,b,c", many("1e99", "7"), "b", "'1e99' in column 'a' is too large a number"),
        ("a,b,c", many("03/04/2024", "04/03/2024"), "b", "column 'a' holds dates such as '03/04/2024'"),
        ("a,b,c", many("2024-02-30", "2024-02-01"), "b", "'2024-02-30' in column 'a' is no date"),
        ("a,b,c", [*many("1")[:5], "1,2"], "b", "line 7: 2 values, and the header names 3 columns"),
        ("a,b,c", [*many("1")[:5], '1,"x,2'], "b", "line 7: unexpected end of data"),
        ("a,a,c", many("1"), "a", "the header names 'a' more than once"),
        ("a", ["1", "2"], "a", "has one column, 'a'"),
        ("a,b,c", [], "b", "a header and no rows"),
        ("", [], "b", "holds nothing"),
        ("a,b,c", ["1,x,2"] * 40, "b", "has one class, 'x'"),
        ("a,b,c", ["1,2.5,2"] * 40, "b", "has one value in all rows, 2.5"),
        ("a,b,c", [f"{i % 3},w{i},{i % 5}" for i in range(40)], "b", "40 different values in 40 rows, too many"),
        ("a,b,c", ["1,,2"] * 40, "b", "has no values to learn from"),
        ("a,b,c", [f"1,{'xy'[i % 2]},2" for i in range(40)], "b", "no column is left to predict 'b' from"),
        ("a,b,c", [f"{i % 3},2024-01-0{1 + i % 9},2" for i in range(40)], "b", "holds dates, which are not predicted"),
        ("a,b,c", ["1,x,2", "2,y,3", "3,x,1", "2,y,4"], "b", "too few"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, header, rows, label, what):
    with pytest.raises(DataError) as caught:
        load_table(written(tmp_path, header, rows), label)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_and_files_that_are_not_there(tmp_path):
    path = written(tmp_path, HEAD, people())
    with pytest.raises(ArgumentError, match=r"has no column 'prise'; there are id, age.*did you mean 'price'"):
        load_table(path, "prise")
    with pytest.raises(ArgumentError, match=r"--label: say which column of .* is to be predicted; there are id"):
        load_table(path, None)
    with pytest.raises(ArgumentError, match=r"--drop: .* has no column 'x'"):
        load_table(path, "price", drop=["x"])
    with pytest.raises(ArgumentError, match="'price' is the column that is to be predicted"):
        load_table(path, "price", drop=["price"])
    with pytest.raises(DataError, match="regression predicts numbers"):
        load_table(path, "city", task="regression")
    with pytest.raises(DataError, match="does not exist"):
        load_table(tmp_path / "none.csv", "price")
    with pytest.raises(DataError, match="cannot be read"):
        load_table(tmp_path, "price")
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        load_table(path, "a")


@pytest.mark.filterwarnings("ignore:apoptosis:RuntimeWarning")  # that so short a run has no event
def test_a_run_on_a_table_says_what_it_took_and_notices_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, HEAD, people())
    arguments = ["train", "--data", "csv:t.csv", "--widths", "16,16", "--epochs", "2", "--batch", "16"]
    assert run([*arguments, "--target", "price", "--out", "one"]) == 0
    out = capsys.readouterr().out
    assert "data: 'price' holds numbers, which are predicted as values" in out
    assert "validation r2" in out
    assert (tmp_path / "one" / "data.json").exists()
    assert run(["train", "--resume", "one", "--target", "price", "--quiet"]) == 0
    assert run([*arguments, "--label", "price", "--target", "2x", "--out", "two", "--quiet"]) == 0
    assert "target: 0.5 of the multiply-adds" in capsys.readouterr().out
    assert run(["plan", "one"]) == 0
    path.write_text(path.read_text().replace("A", "Z"))
    capsys.readouterr()
    assert run(["train", "--resume", "one"]) == 2
    assert "the data of 'csv:t.csv' have changed since" in capsys.readouterr().err
