"""Pictures of runs: a report as one HTML file, and small charts for notebooks.

Example:
    >>> import tempfile
    >>> from tnt_func.observers import History, Row
    >>> history = History(Row(step, 0, "train", "step", {"loss": 1 / step}) for step in range(1, 100))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = report(history, path=f"{directory}/report.html")
    ...     "<title>run</title>" in path.read_text()
    True
"""

from tnt_func.reports.inline import Plot as Plot
from tnt_func.reports.inline import plot as plot
from tnt_func.reports.page import report as report
