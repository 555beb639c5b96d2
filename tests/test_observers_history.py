"""What a History says of itself, in a terminal and in a notebook."""

import math
from typing import Any

import pytest

from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.observers import History, Row


def test_the_repr_has_its_steps_and_the_numbers_of_the_last_row():
    rows = [Row(step, 0, "train", "step", {"loss": 1 / step}) for step in range(1, 1501)]
    last = Row(1500, 1, "eval", "epoch", dict.fromkeys("abcdef", 0.5))
    assert repr(History()) == "History(0 rows)"
    assert repr(History(rows[:1])) == "History(1 row, step 1, train loss 1)"
    assert repr(History(rows)) == "History(1,500 rows, steps 1 to 1,500, train loss 0.0006667)"
    assert repr(History([*rows, last])).endswith("1,500, eval a 0.5, eval b 0.5, eval c 0.5, eval d 0.5, ...)")


def test_a_notebook_shows_the_last_rows():
    rows = [Row(step, 0, "train", "step", {"loss": step / 8}) for step in range(1, 1001)]
    page = History([*rows, Row(1000, 1, "eval", "epoch", {"accuracy": math.nan})])._repr_html_()
    assert page.count("<tr>") == 11 and "<th>loss</th><th>accuracy</th>" in page
    assert "<td>1000</td><td>0</td><td>train</td><td>step</td><td>125</td><td></td></tr>" in page
    assert page.endswith("<td>epoch</td><td></td><td>nan</td></tr></table>") and "<td>991</td>" not in page
    assert History()._repr_html_().startswith("<table><caption>History(0 rows)</caption>")


def test_html_is_escaped():
    page = History([Row(1, 0, "train", "step", {"<script>": 1.0})])._repr_html_()
    assert "<script" not in page and page.count("&lt;script&gt;") == 2


def test_what_is_no_row_and_what_is_no_writer():
    rows: Any
    for rows in ("abc", [Row(1, 0, "train", "step", {}), (2, 0, "train", "step", {})]):
        with pytest.raises(UsageTypeError, match=r"as a row; it has rows of a run. Write History\(\[Row\("):
            History(rows)
    history, other = History([Row(1, 0, "train", "step", {"loss": 0.5})]), History()
    writers: Any
    for writers in ([other, [History()]], [other, History], [print]):
        with pytest.raises(
            UsageTypeError, match=r"^write_to was given .*; it takes writers of rows, .* Write write_to\("
        ):
            history.write_to(*writers)
    with pytest.raises(UsageError, match="twice"):
        history.write_to(history)
    assert (len(history), len(other)) == (1, 0)
