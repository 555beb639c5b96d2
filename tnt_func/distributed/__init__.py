"""Several processes as one run: the same unit, on a mesh of ranks.

Started by torchrun, a process joins the others with `init`; without it, the same script is one process. Ranks have the
same State at every event, so callbacks decide alike on each, and observers may run on any.

Law:
    On n ranks a run is the run of one process, up to rounding: the same samples in the same order, the same events, the
    same State.

Example:
    >>> with init() as world:
    ...     world.size, mesh(world).mesh_dim_names
    (1, ('ranks',))
"""

from tnt_func.distributed.agreement import agreed as agreed
from tnt_func.distributed.batchnorm import sync_batchnorm as sync_batchnorm
from tnt_func.distributed.checkpoints import consolidate as consolidate
from tnt_func.distributed.checkpoints import restore as restore
from tnt_func.distributed.checkpoints import save as save
from tnt_func.distributed.parallel import data_parallel as data_parallel
from tnt_func.distributed.replicas import replicate as replicate
from tnt_func.distributed.resuming import checkpointer as checkpointer
from tnt_func.distributed.resuming import resume as resume
from tnt_func.distributed.shards import gather as gather
from tnt_func.distributed.shards import shard as shard
from tnt_func.distributed.world import World as World
from tnt_func.distributed.world import init as init
from tnt_func.distributed.world import mesh as mesh
from tnt_func.errors import RankError as RankError
