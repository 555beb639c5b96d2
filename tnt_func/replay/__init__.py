"""A run that can be asked questions afterwards: recorded while it goes on, replayed from what was recorded.

A step is a function of (state, batch) and data a function of (key, epoch, index), so a few checkpoints hold every state
of a run. `record` writes digests, metrics and checkpoints; `replay` gives the state after any step, `bisect` the first
one at which something holds, `diff` what differs first, `verify` whether a run gives again what was recorded, `what_if`
where it would have led with one change, `lineage` what it came from. Nothing in a record is ever imported or executed.

Law:
    `replay` gives the bits of the original state after every step, whatever the cadence, kills and resumes.

Example:
    >>> import tempfile
    >>> import tnt_func as tnt
    >>> step = lambda state, batch: (state.replace(params=state.params * batch), {})
    >>> unit, first = tnt.TrainUnit(train_step=step), tnt.State(params=1.0, key=tnt.key(0))
    >>> data = [2.0, 3.0, float("nan"), 5.0]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     end = tnt.train(unit, first, data, max_epochs=1, observers=[record(directory)])
    ...     found = bisect(directory, unit, first, data, lambda state: state.params != state.params)
    ...     replay(directory, unit, first, data, step=2).params, end.params, found.step
    (6.0, nan, 3)
"""

from tnt_func.replay.branching import Branch as Branch
from tnt_func.replay.branching import Branches as Branches
from tnt_func.replay.branching import Change as Change
from tnt_func.replay.branching import what_if as what_if
from tnt_func.replay.differing import Difference as Difference
from tnt_func.replay.differing import diff as diff
from tnt_func.replay.recording import Recording as Recording
from tnt_func.replay.recording import record as record
from tnt_func.replay.replaying import replay as replay
from tnt_func.replay.rows import Lineage as Lineage
from tnt_func.replay.rows import Record as Record
from tnt_func.replay.rows import Row as Row
from tnt_func.replay.rows import lineage as lineage
from tnt_func.replay.searching import Found as Found
from tnt_func.replay.searching import bisect as bisect
from tnt_func.replay.verifying import Verdict as Verdict
from tnt_func.replay.verifying import verify as verify
