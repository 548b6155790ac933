"""docs/scale.md: its tables are what benchmarks/scale.py works out, which is near what was measured."""
import json
import sys

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import scale

ROWS = json.loads(scale.FILE.read_text(encoding="utf-8"))["rows"]


def test_tables_of_the_page_are_others():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in scale.tables().split("\n\n"):
        assert table in page, "the tables of docs/scale.md are not those that benchmarks/scale.py prints"


@pytest.mark.parametrize("size, weights", [
    ("1B", 1_235_814_400), ("7B", 6_738_415_616), ("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_shape_has_another_number_of_weights_than_the_published_model(size, weights):
    assert scale.SHAPES[size].weights == weights


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_memory_counted_is_a_tenth_off_what_was_measured(row):
    assert scale.counted_of(row) == pytest.approx(row["measured"], rel=0.1)


def test_check_leaves_out_a_size_or_shards():
    assert [{name: row[name] for name in scale.ROWS[0]} for row in ROWS] == scale.ROWS
    assert {row["size"] for row in ROWS} == {*scale.SMALL} and {row["processes"] for row in ROWS} == {1, 2}


def test_what_is_in_shards_does_not_shrink_with_their_number():
    """A trained weight costs 16 bytes and a frozen one 4, divided by the processes; the rest stays."""
    shape = scale.SHAPES["7B"]
    for trained, frozen in scale.METHODS.values():
        few, many = (scale.phases(shape, trained, frozen, processes=n)["layer"] for n in (8, 64))
        weights = 16 * (shape.weights + (trained - 1) * shape.body) + 4 * (
            shape.body + (frozen - 1) * shape.weights)
        assert few - many == pytest.approx(weights * (1 / 8 - 1 / 64))
