"""Numbers that follow the step: a `Schedule` is `step -> number`, a pure function.

Step 0 gives the number of the first update; steps before it count as 0. An int gives a float, a tensor gives a float64
tensor of its shape (float32 on MPS) without looking at its value, so a schedule runs inside `torch.compile` and
`torch.func.vmap`. Whether a step is an update or an epoch is the caller's choice: an optimizer counts its updates.

Laws:
    A schedule remembers nothing: it gives the same number for the same step, in any order, in any process.

Example:
    >>> lr = warmup(cosine(0.1, steps=90), steps=10)
    >>> [round(lr(step), 4) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    >>> import torch
    >>> lr(torch.tensor(55))
    tensor(0.0500, dtype=torch.float64)
"""

from tnt_func.schedules.curves import Schedule as Schedule
from tnt_func.schedules.curves import constant as constant
from tnt_func.schedules.curves import cosine as cosine
from tnt_func.schedules.curves import cosine_with_restarts as cosine_with_restarts
from tnt_func.schedules.curves import exponential as exponential
from tnt_func.schedules.curves import inverse_sqrt as inverse_sqrt
from tnt_func.schedules.curves import linear as linear
from tnt_func.schedules.curves import one_cycle as one_cycle
from tnt_func.schedules.curves import polynomial as polynomial
from tnt_func.schedules.curves import step as step
from tnt_func.schedules.from_torch import from_torch_scheduler as from_torch_scheduler
from tnt_func.schedules.joining import joined as joined
from tnt_func.schedules.joining import multistep as multistep
from tnt_func.schedules.joining import piecewise as piecewise
from tnt_func.schedules.joining import warmup as warmup
from tnt_func.schedules.joining import warmup_stable_decay as warmup_stable_decay
