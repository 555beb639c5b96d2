"""Checkpoints: a State in a directory, whole or not at all.

`save` writes one atomically, `restore` gives it back to the bit, and a damaged one is refused with the leaf named.
Tensors are in safetensors, the rest in strict JSON; both are under checksums (CRC-32), and nothing is ever unpickled.

Law:
    `restore(save(s)) == s` bitwise; a damaged or half-written checkpoint is refused, never half-loaded, and loading
    runs no code (law 15, `tnt_func.testing.check_checkpoint`).

Example:
    >>> import tempfile
    >>> import torch
    >>> import tnt_func as tnt
    >>> step = lambda state, batch: (state.replace(params=state.params + batch), {})
    >>> unit, first = tnt.TrainUnit(train_step=step), tnt.State(params=torch.zeros(2), key=tnt.key(0))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     state = tnt.train(unit, first, [1, 2], max_epochs=2)
    ...     tnt.checkpoint.save(f"{directory}/{tnt.checkpoint.name(state)}", state)
    ...     resumed = tnt.checkpoint.resume(directory, like=tnt.prepare(unit, first))
    >>> tnt.digest(resumed) == tnt.digest(state)
    True
"""

from tnt_func.checkpoint.listing import best as best
from tnt_func.checkpoint.listing import checkpoints as checkpoints
from tnt_func.checkpoint.listing import latest as latest
from tnt_func.checkpoint.listing import name as name
from tnt_func.checkpoint.listing import resume as resume
from tnt_func.checkpoint.manifest import Manifest as Manifest
from tnt_func.checkpoint.restoring import inspect as inspect
from tnt_func.checkpoint.restoring import restore as restore
from tnt_func.checkpoint.saving import save as save
