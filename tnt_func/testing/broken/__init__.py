"""The zoo: for every law, units, callbacks, metrics, observers and data that break it, each beside its sound twin.

A function of the zoo takes whether its subject shall be broken, which is the only difference there is. Its decorator
says which law `check_unit` must name, what its message must say, and which laws fall with it. `CONTROLS` has them all.

Example:
    >>> print(CONTROLS["dtype_drift"].violations(broken=True)["structure"])
    law 3 (structure) is broken at train step (epoch 0, step 2): train_step changed the structure of the state
      state.params['w']: float32[2] became float64[2]
    ...
"""

from tnt_func.testing.broken import calls as calls
from tnt_func.testing.broken import metrics as metrics
from tnt_func.testing.broken import runs as runs
from tnt_func.testing.broken.control import CONTROLS as CONTROLS
from tnt_func.testing.broken.control import Control as Control
from tnt_func.testing.broken.control import Subject as Subject
