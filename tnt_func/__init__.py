"""tnt_func: training as a fold of pure steps.

A unit says what one step does, a State holds everything the run knows, and the loop folds the unit over the data and
hands every intermediate state out as an event.
"""

import typing as _typing
from importlib import import_module as _import_module

from tnt_func import asserts as asserts
from tnt_func import callbacks as callbacks
from tnt_func import data as data
from tnt_func import errors as errors
from tnt_func import metrics as metrics
from tnt_func import optim as optim
from tnt_func import pytree as pytree
from tnt_func import rng as rng
from tnt_func import schedules as schedules
from tnt_func import transforms as transforms
from tnt_func import treemath as treemath
from tnt_func.compiling import Compilation as _Compilation
from tnt_func.compiling import compiled as compiled
from tnt_func.compiling.steps import listeners as _listeners
from tnt_func.compose import alternate as alternate
from tnt_func.compose import focus as focus
from tnt_func.compose import sequence as sequence
from tnt_func.data.cursors import batches as batches
from tnt_func.descent import minimize as minimize
from tnt_func.events import Event as Event
from tnt_func.events import Observer as Observer
from tnt_func.metrics import Metric as Metric
from tnt_func.model import Model as Model
from tnt_func.model import from_module as from_module
from tnt_func.progress import Progress as Progress
from tnt_func.recipes import supervised as supervised
from tnt_func.rng import Key as Key
from tnt_func.rng import fold_in as fold_in
from tnt_func.rng import key as key
from tnt_func.rng import split as split
from tnt_func.runs import evaluate as evaluate
from tnt_func.runs import evaluate_events as evaluate_events
from tnt_func.runs import fit as fit
from tnt_func.runs import fit_events as fit_events
from tnt_func.runs import predict as predict
from tnt_func.runs import predict_events as predict_events
from tnt_func.runs import train as train
from tnt_func.runs import train_events as train_events
from tnt_func.state import State as State
from tnt_func.state import digest as digest
from tnt_func.state import keep as keep
from tnt_func.transforms import donate as donate
from tnt_func.transitions import end_epoch as end_epoch
from tnt_func.transitions import prepare as prepare
from tnt_func.transitions import start_epoch as start_epoch
from tnt_func.transitions import step as step
from tnt_func.unit import Callback as Callback
from tnt_func.unit import EvalUnit as EvalUnit
from tnt_func.unit import FitUnit as FitUnit
from tnt_func.unit import Hook as Hook
from tnt_func.unit import PredictUnit as PredictUnit
from tnt_func.unit import Step as Step
from tnt_func.unit import TrainUnit as TrainUnit
from tnt_func.unit import attach as attach

__version__ = "0.1.0"

# The loop does without these packages: each is imported when it, or a name of it, is first asked for (PEP 562).
if _typing.TYPE_CHECKING:
    from tnt_func import checkpoint as checkpoint
    from tnt_func import distributed as distributed
    from tnt_func import ensembles as ensembles
    from tnt_func import observers as observers
    from tnt_func import pausing as pausing
    from tnt_func import rehearsal as rehearsal
    from tnt_func import replay as replay
    from tnt_func import reports as reports
    from tnt_func.ensembles import ensemble as ensemble
    from tnt_func.ensembles import member as member
    from tnt_func.ensembles import stack as stack
    from tnt_func.ensembles import sweep as sweep
    from tnt_func.ensembles import unstack as unstack
    from tnt_func.rehearsal import fast_dev_run as fast_dev_run
    from tnt_func.rehearsal import overfit_batches as overfit_batches
    from tnt_func.rehearsal import sanity_check as sanity_check
    from tnt_func.reports import plot as plot
    from tnt_func.reports import report as report
else:
    _LATER = {
        "checkpoint": (),
        "distributed": (),
        "ensembles": ("ensemble", "member", "stack", "sweep", "unstack"),
        "observers": (),
        "pausing": (),
        "rehearsal": ("fast_dev_run", "overfit_batches", "sanity_check"),
        "replay": (),
        "reports": ("plot", "report"),
    }
    __all__ = [name for name in {*globals(), *_LATER, *sum(_LATER.values(), ())} if name[0] != "_"]

    def __getattr__(name):
        for package, names in _LATER.items():
            if name == package or name in names:
                module = _import_module(f"{__name__}.{package}")
                globals()[name] = found = module if name == package else getattr(module, name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


def _tell(compilation: _Compilation) -> None:
    # Compiling is below observers and may not name them; this package gathers both.
    from tnt_func.observers.compilations import to_a_terminal

    to_a_terminal(compilation)


_listeners.append(_tell)
