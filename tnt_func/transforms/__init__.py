"""Units made of units: how a step is taken, and what is averaged, skipped and measured beside it.

A transform takes a TrainUnit or a FitUnit and gives one of the same kind. What it remembers has a slot of its own in
`state.memory`. Those that change how a gradient is found reach into steps that `tnt.minimize` makes, through whatever
other transforms are around them, so transforms compose in any order.

Laws:
    On a run where all is finite, `ema`, `swa`, `skip_nonfinite`, `with_gradient_stats`, `detect_anomaly` and `remat`
    change nothing but their own slot and output. `microbatch(unit, 1)` is the unit. Any order of transforms, with
    callbacks attached in between, gives the same bits.

Example:
    >>> import torch
    >>> from tnt_func import optim, rng
    >>> from tnt_func.recipes import supervised
    >>> layer = torch.nn.Linear(2, 1)
    >>> unit, state = supervised(layer, torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> sorted(skip_nonfinite(ema(microbatch(autocast(unit), 4), 0.99)).train_unit.memory)
    ['ema', 'skip_nonfinite']
"""

from tnt_func.transforms.averages import averaged as averaged
from tnt_func.transforms.averages import ema as ema
from tnt_func.transforms.averages import swa as swa
from tnt_func.transforms.averages import update_bn as update_bn
from tnt_func.transforms.donating import donate as donate
from tnt_func.transforms.guards import detect_anomaly as detect_anomaly
from tnt_func.transforms.guards import skip_nonfinite as skip_nonfinite
from tnt_func.transforms.guards import with_gradient_stats as with_gradient_stats
from tnt_func.transforms.guards import with_gradients as with_gradients
from tnt_func.transforms.microbatches import microbatch as microbatch
from tnt_func.transforms.precision import autocast as autocast
from tnt_func.transforms.rematerialisation import remat as remat
