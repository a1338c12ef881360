"""Plots of kernel benchmarks: a panel for each table, in which bars are ratios to that table's floor."""

import pytest

from benchmarks.pages import floors, panels

pytest.importorskip("matplotlib")


def row(table: str, name: str, seconds: float, mib: float, **more) -> dict:
    return {"table": table, "name": name, "seconds": seconds, "mib": mib, "floor": "floor", **more}


# Two tables whose labels are the same, so that bars by label would lie on one another
ROWS = [
    row("float32, from logits", "floor", 2.0, 10),
    row("float32, from logits", "mohawk", 3.0, 20),
    row("float32, from logits", "eager", 8.0, 90),
    row("float32, from hidden states", "floor", 0.5, 11),
    row("float32, from hidden states", "mohawk", 0.25, 21),
]


def bars(axis) -> list[float]:
    return [patch.get_width() for patch in axis.patches]


def test_each_table_has_its_panel_and_its_floor():
    figure = panels(ROWS, "title")
    upper_time, upper_memory, lower_time, lower_memory = figure.axes
    assert upper_time.get_title("left") == "float32, from logits"
    assert lower_time.get_title("left") == "float32, from hidden states"
    assert bars(upper_time) == [1.0, 1.5, 4.0] and bars(upper_memory) == [10, 20, 90]
    assert bars(lower_time) == [1.0, 0.5] and bars(lower_memory) == [11, 21]
    assert [label.get_text() for label in upper_time.get_yticklabels()] == ["floor", "mohawk", "eager"]
    assert [label.get_text() for label in lower_time.get_yticklabels()] == ["floor", "mohawk"]
    assert "1.50 x  (3 s)" in [text.get_text() for text in upper_time.texts]
    assert figure.get_size_inches()[1] > 3, "as high as its bars need"


def test_rows_of_one_name_are_bars_of_their_own():
    figure = panels([*ROWS[:2], row("float32, from logits", "mohawk", 6.0, 30)], "title")
    assert bars(figure.axes[0]) == [1.0, 1.5, 3.0]


def test_curves_are_ratios_at_each_length():
    rows = [
        row("d 64", f"{name}, n {n}", seconds, mib, at=n, floor=f"floor, n {n}")
        for n, times in ((128, (1.0, 4.0)), (256, (2.0, 6.0)))
        for name, seconds, mib in zip(("floor", "mohawk"), times, (1, 2), strict=True)
    ]
    assert floors(rows) == [1.0, 4.0, 1.0, 3.0]
    time, memory = panels(rows, "title").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in time.lines}
    assert lines == {"floor": [1.0, 1.0], "mohawk": [4.0, 3.0]}
    assert [list(line.get_ydata()) for line in memory.lines] == [[1, 1], [2, 2]]


def test_nothing_to_draw():
    assert panels([], "title") is None
