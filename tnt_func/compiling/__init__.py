"""Steps as one graph of machine code: forward, backward, optimizer, metrics and transforms.

`compiled(unit)` is the unit with steps that are traced once for every structure of state and batch (containers, shapes,
strides, dtypes, devices, and leaves that are no tensors), and run as one graph afterwards. Sizes of batches may vary in
their first dimension from 2 on. What a step reads in Python and is neither state nor batch is read once, when it is
traced, as by `jax.jit`. Draws are those of the step as it was: the loop seeds torch around it.

Laws:
    Law 12. A compiled step is the step, up to rounding. There is one compilation for a structure.

Example:
    >>> import torch
    >>> from tnt_func import optim, rng
    >>> from tnt_func.recipes import supervised
    >>> from tnt_func.runs import train
    >>> unit, state = supervised(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> fast = compiled(unit, backend="aot_eager").train_unit
    >>> data = [(torch.ones(4, 2), torch.ones(4, 1)), (torch.ones(3, 2), torch.ones(3, 1))]
    >>> state = train(fast, state, data, max_epochs=2)
    >>> len(fast.train_step.compilations)
    1
"""

from tnt_func.compiling.steps import Compilation as Compilation
from tnt_func.compiling.steps import Compiled as Compiled
from tnt_func.compiling.steps import FallbackWarning as FallbackWarning
from tnt_func.compiling.steps import OnCompile as OnCompile
from tnt_func.compiling.steps import RecompilationWarning as RecompilationWarning
from tnt_func.compiling.steps import Unseeded as Unseeded
from tnt_func.compiling.units import compiled as compiled
