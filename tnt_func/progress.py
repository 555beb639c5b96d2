"""How far a run has come: epochs and steps completed, as lifetime totals.

Laws:
    Counters are a function of the events: a step adds one to `steps` and `steps_in_epoch`, before its step_end hooks;
    an epoch's end adds one to `epochs` and sets `steps_in_epoch` to 0, before its epoch_end hooks.

Example:
    >>> Progress().after_step().after_step().after_epoch()
    Progress(epochs=1, steps=2, steps_in_epoch=0)
"""

from typing import NamedTuple

from tnt_func.types import Phase


class Progress(NamedTuple):
    """Counters of one phase.

    Args:
        epochs: epochs completed.
        steps: steps completed, over all epochs.
        steps_in_epoch: steps completed in the open epoch; 0 where none is open.

    Example:
        >>> Progress(epochs=2, steps=7, steps_in_epoch=1).is_open
        True
    """

    epochs: int = 0
    steps: int = 0
    steps_in_epoch: int = 0

    @property
    def is_open(self) -> bool:
        """Whether an epoch has begun and not ended.

        Example:
            >>> Progress().is_open
            False
        """
        return self.steps_in_epoch > 0

    def after_step(self) -> "Progress":
        """These counters once one more step is completed.

        Example:
            >>> Progress().after_step()
            Progress(epochs=0, steps=1, steps_in_epoch=1)
        """
        return Progress(self.epochs, self.steps + 1, self.steps_in_epoch + 1)

    def after_epoch(self) -> "Progress":
        """These counters once the open epoch is completed; an epoch without a step counts too.

        Example:
            >>> Progress(0, 3, 3).after_epoch()
            Progress(epochs=1, steps=3, steps_in_epoch=0)
        """
        return Progress(self.epochs + 1, self.steps, 0)


class RunProgress(NamedTuple):
    """The counters of the three phases, side by side.

    Example:
        >>> RunProgress().of("train").steps
        0
    """

    train: Progress = Progress()
    eval: Progress = Progress()
    predict: Progress = Progress()

    def of(self, phase: Phase) -> Progress:
        """The counters of one phase.

        Example:
            >>> RunProgress(eval=Progress(1)).of("eval").epochs
            1
        """
        return self.train if phase == "train" else self.eval if phase == "eval" else self.predict

    def put(self, phase: Phase, progress: Progress) -> "RunProgress":
        """These counters with those of one phase replaced.

        Example:
            >>> RunProgress().put("train", Progress(1)).train.epochs
            1
        """
        if phase == "train":
            return RunProgress(progress, self.eval, self.predict)
        if phase == "eval":
            return RunProgress(self.train, progress, self.predict)
        return RunProgress(self.train, self.eval, progress)
