"""Decisions of one rank that become decisions of all, at the same step."""

from torch.distributed.device_mesh import DeviceMesh

from tnt_func.distributed.collectives import Exchange
from tnt_func.distributed.world import Ranks
from tnt_func.factories import factory
from tnt_func.pausing import Pause


@factory
def agreed(pause_when: Pause, mesh: DeviceMesh) -> Pause:
    """Pause on every rank where one of them says so: a signal that one process gets, a clock that is ahead.

    Ranks are asked at the same points, so all of them pause at the same step. It costs a message each time.

    Args:
        pause_when: of this rank.
        mesh: the ranks.

    Raises:
        RankError: when asked, where ranks are at different points, or one has left.

    Example:
        >>> import tnt_func as tnt
        >>> with tnt.distributed.init() as world, tnt.pausing.on_signal() as signalled:
        ...     pause_when = agreed(signalled, tnt.distributed.mesh(world))
        ...     pause_when()
        False
    """
    ranks = Ranks.of(mesh)
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        mine = pause_when()
        if ranks.size == 1:
            return mine
        return any(bool(said) for (said,) in Exchange(ranks, "pause_when", asked, [float(mine)]).wait())

    return pause
