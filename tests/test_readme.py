"""The README's code runs top to bottom and prints what the README shows; its make targets exist."""

import doctest
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = README.read_text()
BLOCKS = [(found[1], found[2], TEXT.count("\n", 0, found.start(2))) for found in FENCE.finditer(TEXT)]


def test_python_blocks_run_and_print_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # A module of its own, since dataclasses look the names in their annotations up in sys.modules.
    readme = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", readme)
    monkeypatch.chdir(tmp_path)
    assert any(language == "python" for language, _, _ in BLOCKS)
    for (language, code, line), (shown_as, shown, _) in zip(BLOCKS, [*BLOCKS[1:], ("", "", 0)], strict=True):
        if language != "python":
            continue
        # The empty lines before it make a traceback name the line of the README.
        exec(compile("\n" * line + code, README, "exec"), vars(readme))
        printed = capsys.readouterr().out
        if shown_as == "text":
            matches = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
            assert matches, f"README.md:{line + 1} prints\n{printed}\nand shows\n{shown}"


def commands() -> list[str]:
    lines = [
        line for language, text, _ in BLOCKS if language in {"sh", "bash", "console"} for line in text.splitlines()
    ]
    return [line.removeprefix("$ ").partition("#")[0].strip() for line in lines]


def test_the_two_commands_are_shown():
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_command_has_its_target(command: str):
    # A dry run: make prints what it would do, or says that it has no rule for a target.
    dry = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def test_the_map_names_what_is_there():
    rows = TEXT.partition("## The map of the code")[2].partition("\n## ")[0].splitlines()
    named = [name for row in rows if row.startswith("| `") for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])]
    assert named
    assert [name for name in named if not (ROOT / "tnt_func" / name).exists()] == []
