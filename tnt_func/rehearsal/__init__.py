"""The checks before a long run: it is rehearsed in small, on a copy, and what was found is said in plain words.

`fast_dev_run` takes a few steps through every hook, epoch end and evaluation included, and tells what they cost;
`sanity_check` evaluates first and holds the cheap laws against the real model; `overfit_batches` asks whether the model
can learn a few batches by heart. Each returns a `Rehearsal`: a value to print, or to assert `.ok` of.

Laws:
    A rehearsal leaves no trace: the caller's state, the order of the data, the generators that loaders own and the
    global ones are afterwards what they were. Nothing of it reaches the real run.

Example:
    >>> import torch
    >>> import tnt_func as tnt
    >>> unit, state = tnt.supervised(
    ...     torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0)
    ... )
    >>> data = [(torch.randn(4, 2), torch.ones(4, 1)) for _ in range(3)]
    >>> fast_dev_run(unit.train_unit, state, data, max_epochs=10).ok
    True
"""

from tnt_func.rehearsal.findings import Rehearsal as Rehearsal
from tnt_func.rehearsal.overfitting import overfit_batches as overfit_batches
from tnt_func.rehearsal.running import fast_dev_run as fast_dev_run
from tnt_func.rehearsal.sanity import sanity_check as sanity_check
