"""Optimizers: pure functions from gradients to parameters, and what composes them.

Example:
    >>> import torch
    >>> optimizer = adamw(3e-4)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> get(set_hyperparameters(opt_state, lr=1e-4), "lr")
    tensor(0.0001, dtype=torch.float64)
"""

from tnt_func.optim.accumulating import accumulate as accumulate
from tnt_func.optim.adaptive import adagrad as adagrad
from tnt_func.optim.adaptive import adam as adam
from tnt_func.optim.adaptive import adamw as adamw
from tnt_func.optim.adaptive import rmsprop as rmsprop
from tnt_func.optim.base import GradientTransform as GradientTransform
from tnt_func.optim.base import Optimizer as Optimizer
from tnt_func.optim.base import chain as chain
from tnt_func.optim.base import flush as flush
from tnt_func.optim.freezing import frozen as frozen
from tnt_func.optim.from_torch import from_torch as from_torch
from tnt_func.optim.grouping import grouped as grouped
from tnt_func.optim.momentum import lion as lion
from tnt_func.optim.momentum import muon as muon
from tnt_func.optim.momentum import sgd as sgd
from tnt_func.optim.state import OptState as OptState
from tnt_func.optim.state import get as get
from tnt_func.optim.state import hyperparameters as hyperparameters
from tnt_func.optim.state import set_hyperparameters as set_hyperparameters
from tnt_func.optim.transforms import add_decayed_weights as add_decayed_weights
from tnt_func.optim.transforms import add_noise as add_noise
from tnt_func.optim.transforms import centralize as centralize
from tnt_func.optim.transforms import clip_by_global_norm as clip_by_global_norm
from tnt_func.optim.transforms import clip_by_value as clip_by_value
