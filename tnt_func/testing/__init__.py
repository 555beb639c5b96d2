"""The laws of tnt_func as functions to call on units, callbacks, metrics and observers of your own.

Neither pytest nor Hypothesis is needed: a check returns None, or raises a `tnt_func.errors.LawError` (an
AssertionError) that says which law broke, where, on which leaf, who did it, and what to write instead. `strategies`
(which needs Hypothesis) generates runs for property tests, `broken` is a zoo of units that break each law.

Example:
    >>> import torch
    >>> from tnt_func.rng import key
    >>> from tnt_func.state import State
    >>> from tnt_func.unit import TrainUnit
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params - batch), {}))
    >>> check_unit(unit, State(params=torch.zeros(2), key=key(0)), [1.0, 2.0])
"""

from tnt_func.testing.accumulation import check_accumulation as check_accumulation
from tnt_func.testing.calls import check_purity as check_purity
from tnt_func.testing.calls import check_structure as check_structure
from tnt_func.testing.checked import checked as checked
from tnt_func.testing.checkpoint import check_checkpoint as check_checkpoint
from tnt_func.testing.compiling import check_compiled as check_compiled
from tnt_func.testing.composition import check_composition as check_composition
from tnt_func.testing.composition import check_metric as check_metric
from tnt_func.testing.donation import check_donation as check_donation
from tnt_func.testing.ensemble import check_ensemble as check_ensemble
from tnt_func.testing.fusing import check_fused as check_fused
from tnt_func.testing.grammar import check_events as check_events
from tnt_func.testing.grammar import check_grammar as check_grammar
from tnt_func.testing.oracle import check_oracle as check_oracle
from tnt_func.testing.pipelines import check_pipeline as check_pipeline
from tnt_func.testing.ranks import check_ranks as check_ranks
from tnt_func.testing.resume import check_resume as check_resume
from tnt_func.testing.runs import check_determinism as check_determinism
from tnt_func.testing.runs import check_evaluation as check_evaluation
from tnt_func.testing.runs import check_observers as check_observers
from tnt_func.testing.unit import check_unit as check_unit
