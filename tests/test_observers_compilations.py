import re

import pytest
import torch

import tnt_func as tnt
from tnt_func.compiling import RecompilationWarning


def test_compilations_are_told_while_they_happen(capsys: pytest.CaptureFixture[str]):
    seen: list[str] = []

    def train_step(state: tnt.State, batch: torch.Tensor) -> tuple[tnt.State, dict[str, torch.Tensor]]:
        seen.append(capsys.readouterr().err)
        return state.replace(params=state.params + batch.sum()), {}

    unit = tnt.compiled(
        tnt.TrainUnit(train_step=train_step), backend="aot_eager", on_compile=tnt.observers.compilations()
    )
    state = tnt.State(params=torch.tensor(0.0), key=tnt.key(0))
    state = tnt.train(unit, state, [torch.ones(2), torch.ones(3)], max_epochs=1)
    with pytest.warns(RecompilationWarning):
        tnt.train(unit, state, [torch.ones(2, 2)], max_epochs=2)
    assert seen[0] == "compiling train_step ...\n"
    assert re.fullmatch(
        r"compiled train_step in \d+\.\d s\n"
        r"compiling train_step \.\.\. again: batch was float32\[2\] and is float32\[2, 2\]\n",
        seen[1],
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_without_being_asked(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    unit = tnt.compiled(tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch})), backend="aot_eager")
    tnt.train(unit, tnt.State(params=torch.tensor(0.0), key=tnt.key(0)), [torch.ones(2)], max_epochs=1)
    told = capsys.readouterr().err
    assert re.fullmatch(r"compiling train_step \.\.\.\ncompiled train_step in \d+\.\d s\n" if terminal else "", told)
