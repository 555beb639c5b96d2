"""Ensembles: members of one structure trained as one, for error bars over seeds, and sweeps over hyper-parameters.

Example:
    >>> import torch
    >>> from torch import nn
    >>> import tnt_func as tnt
    >>> members = []
    >>> for seed in range(4):
    ...     _ = torch.manual_seed(seed)
    ...     made = tnt.supervised(nn.Linear(1, 1), nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0))
    ...     members.append(made)
    >>> unit, state = tnt.ensemble(members[0][0], 4), tnt.stack([state for _, state in members])
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> state = tnt.fit(unit, state, [(x, 2 * x)], [(x, 2 * x)], max_epochs=200)
    >>> spread(tnt.metrics.compute(state, "eval")["loss"]).mean < 1e-4
    tensor(True)
"""

from tnt_func.ensembles.ensemble import ensemble as ensemble
from tnt_func.ensembles.metrics import PerMember as PerMember
from tnt_func.ensembles.metrics import Spread as Spread
from tnt_func.ensembles.metrics import spread as spread
from tnt_func.ensembles.stacking import member as member
from tnt_func.ensembles.stacking import revive as revive
from tnt_func.ensembles.stacking import stack as stack
from tnt_func.ensembles.stacking import stop_members as stop_members
from tnt_func.ensembles.stacking import stopped as stopped
from tnt_func.ensembles.stacking import unstack as unstack
from tnt_func.ensembles.sweeps import Sweep as Sweep
from tnt_func.ensembles.sweeps import Table as Table
from tnt_func.ensembles.sweeps import sweep as sweep
