"""What the code may import and do, where import-linter cannot see it."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import tnt_func

ROOT = Path(__file__).parent.parent
MODULES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.glob("tnt_func/**/*.py"))}
FLOORS_6_AND_7 = {"checkpoint", "lines", "pausing", "replay", "distributed", "reports", "observers", "testing"}
BROUGHT_IN = set(
    "arguments asserts callbacks compiling compose data descent donation errors events factories gradients loop "
    "meshes metrics model optim progress pytree recipes rng runs schedules state transforms transitions treemath "
    "types unit".split()
)
CODE = ("tnt_func", "tests", "property_tests", "examples", "benchmarks")
OPTIONAL = (
    "hypothesis ignite lightning matplotlib mlflow numpy pandas psutil pyarrow pynvml pytest rich safetensors scipy "
    "sklearn sqlalchemy tensorboard torchmetrics torchtnt torchvision tqdm wandb"
).split()


def spelled(node: ast.AST) -> str | None:
    """`a.b.c` of a chain of attributes that starts at a name."""
    match node:
        case ast.Name(id):
            return id
        case ast.Attribute(value, attr):
            owner = spelled(value)
            return None if owner is None else f"{owner}.{attr}"
        case _:
            return None


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name that the code imports or spells out, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(aliases):
                yield from ((alias.name, node.lineno) for alias in aliases)
            case ast.ImportFrom(module, aliases):
                yield from ((f"{module or ''}.{alias.name}", node.lineno) for alias in aliases)
            case ast.Name(lineno=line) | ast.Attribute(lineno=line):
                name = spelled(node)
                if name is not None:
                    yield name, line
            case _:
                pass


def uses(pattern: str, modules: dict[Path, ast.Module] = MODULES) -> list[str]:
    """`path:line name` of each name in which the pattern matches."""
    return [
        f"{path.as_posix()}:{line} {name}"
        for path, tree in modules.items()
        for name, line in names(tree)
        if re.search(pattern, name)
    ]


PYTREE = r"\b_pytree\b"
FUNCTIONAL_CALL = r"\bfunctional_call\b"
PICKLE = (
    r"^(pickle|cloudpickle|dill|marshal|shelve|joblib)\b|^torch\.(load|save|serialization)\b"
    r"|\b(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?\b"
)
PRINTING = r"^(print|input|breakpoint)$|^sys\.(stdout|stderr)\b|^warnings\.showwarning$"


@pytest.mark.parametrize(
    ("pattern", "offence"),
    [
        (PYTREE, "from torch.utils import _pytree"),
        (PYTREE, "import torch.utils._pytree as leaves"),
        (PYTREE, "import torch\ntorch.utils._pytree.tree_map(f, x)"),
        (FUNCTIONAL_CALL, "from torch.func import functional_call"),
        (FUNCTIONAL_CALL, "torch.nn.utils.stateless.functional_call(m, p, x)"),
        (PICKLE, "import pickle"),
        (PICKLE, "from pickle import dumps"),
        (PICKLE, "def load(path):\n    return torch.load(path)"),
        (PICKLE, "from torch import load"),
        (PICKLE, "import torch.distributed as dist\ndist.all_gather_object(found, value)"),
        (PRINTING, "if True:\n    print(1)"),
        (PRINTING, "import sys\nsys.stdout.write('')"),
        (PRINTING, "from sys import stderr"),
    ],
)
def test_an_offence_is_seen(pattern: str, offence: str):
    assert uses(pattern, {Path("offence.py"): ast.parse(offence)})


@pytest.mark.parametrize(("pattern", "home"), [(PYTREE, "tnt_func/pytree.py"), (FUNCTIONAL_CALL, "tnt_func/model.py")])
def test_one_module_alone_uses(pattern: str, home: str):
    found = uses(pattern)
    assert {use.partition(":")[0] for use in found} == {home}, found


def test_nothing_is_pickled():
    assert uses(PICKLE) == []


def test_floors_0_to_5_print_nothing():
    quiet = {path: tree for path, tree in MODULES.items() if path.with_suffix("").parts[1] not in FLOORS_6_AND_7}
    assert uses(PRINTING, quiet) == []


def test_no_file_is_longer_than_400_lines():
    lengths = {path: path.read_text().count("\n") for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    assert {path.relative_to(ROOT).as_posix(): n for path, n in lengths.items() if n > 400} == {}


def test_no_file_names_a_path_of_a_machine():
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md"}]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    machine = re.compile(r"(?<![\w.)}\]])(/(work|root|home|Users|opt|mnt|tmp)\b|[A-Z]:\\\w)|\b(extra-)?index-url\b")
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number} {line.strip()}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_import_needs_torch_and_beartype_only():
    # None in sys.modules makes an import fail. torch warns that NumPy is not there, hence the filter.
    run = fresh_python(f"""
import json, sys, warnings
sys.modules.update(dict.fromkeys({OPTIONAL}))
warnings.simplefilter("ignore")
import beartype, torch
before = set(sys.modules)
import tnt_func
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
""")
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout)) - sys.stdlib_module_names <= {"tnt_func", "torch", "beartype"}


def test_import_has_no_side_effect():
    run = fresh_python("""
import os, pickle, random, signal, sys, threading, warnings
import numpy, torch, torch.func

def world():
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "NumPy's generator": pickle.dumps(numpy.random.get_state()),
        "random's generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "threads": threading.enumerate(),
        "environment": dict(os.environ),
        "filters of warnings": list(warnings.filters),
        "hooks": (sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    }

before = world()
import tnt_func
after = world()
assert before == after, [what for what in before if before[what] != after[what]]
""")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_brings_in_what_the_loop_needs():
    run = fresh_python("""
import json, sys, torch
before = set(sys.modules)
import tnt_func
print(json.dumps(sorted(set(sys.modules) - before)))
""")
    names = [name.split(".") for name in json.loads(run.stdout)]
    assert {at[1] for at in names if at[0] == "tnt_func" and len(at) > 1} == BROUGHT_IN
    assert "beartype" not in {at[0] for at in names}


def test_names_that_wait_are_those_that_type_checkers_read():
    [block] = [node for node in MODULES[Path("tnt_func", "__init__.py")].body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    read = {(node.module, alias.name, alias.asname) for node in imports for alias in node.names}
    later: dict[str, tuple[str, ...]] = vars(tnt_func)["_LATER"]
    names = {(f"tnt_func.{package}", name) for package in later for name in later[package]}
    assert read == {("tnt_func", name, name) for name in later} | {(module, name, name) for module, name in names}
    assert all(getattr(tnt_func, name) is import_module(f"tnt_func.{name}") for name in later)
    assert all(getattr(tnt_func, name) is getattr(import_module(module), name) for module, name in names)
    assert later.keys() | {name for _, name in names} <= {*dir(tnt_func)} & {*vars(tnt_func)["__all__"]}


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="module 'tnt_func' has no attribute 'trian'"):
        getattr(tnt_func, "trian")  # noqa: B009


# Aliases of types defined elsewhere (`Batch = Any`) have no docstring of their own.
PUBLIC = {
    name: value
    for name in dir(tnt_func)
    for value in [getattr(tnt_func, name)]
    if not name.startswith("_")
    and not isinstance(value, ModuleType)
    and getattr(value, "__module__", "").startswith("tnt_func")
}


def test_no_public_name_is_that_of_a_module():
    # The first import of the module would put it in the place of the function.
    assert PUBLIC.keys() & {path.with_suffix("").parts[1] for path in MODULES} == set()


def test_public_names_are_there():
    assert {"State", "TrainUnit", "Callback", "train", "evaluate", "predict", "fit", "step"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_with_an_example(name: str):
    documentation = inspect.getdoc(PUBLIC[name]) or ""
    assert "Example" in documentation and ">>>" in documentation, documentation
