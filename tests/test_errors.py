"""The exceptions and `deprecated`."""

import inspect

import pytest

from tnt_func import errors
from tnt_func.errors import ContractError, TntError, call, deprecated, kind_of

BUILTINS = {
    "UsageError": ValueError,
    "UsageTypeError": TypeError,
    "ContractError": RuntimeError,
    "ConsumedError": RuntimeError,
    "StructureError": ValueError,
    "TreeError": AssertionError,
    "DataError": ValueError,
    "ResumeError": errors.DataError,
    "CheckpointError": OSError,
    "RankError": RuntimeError,
    "LawError": AssertionError,
    "MissingExtraError": ImportError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_error_is_also_the_builtin_that_fits(name: str, builtin: type[Exception]):
    error = getattr(errors, name)
    assert issubclass(error, TntError) and issubclass(error, builtin)
    with pytest.raises(builtin, match="what was given"):
        raise error("what was given")


def test_every_exception_of_the_module_is_listed_here_and_says_what_it_means():
    found = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)}
    assert found.keys() == {"TntError", *BUILTINS}
    assert all(cls.__doc__ for cls in found.values())


@deprecated(since="0.2", removed_in="0.4", instead="new(x, scale=2)")
def old(x: int, *, scale: int = 1) -> int:
    """The old way."""
    return x * scale


def test_deprecated_warns_at_every_call_and_at_the_line_of_the_caller():
    for _ in range(2):
        with pytest.warns(FutureWarning) as caught:
            assert old(3, scale=2) == 6
        assert [str(warning.message) for warning in caught] == [
            "old is deprecated since 0.2 and goes in 0.4; write new(x, scale=2) instead."
        ]
        assert caught[0].filename == __file__


def test_deprecated_keeps_the_name_the_docstring_and_the_signature():
    assert (old.__name__, old.__doc__) == ("old", "The old way.")
    assert list(inspect.signature(old).parameters) == ["x", "scale"]


@pytest.mark.parametrize(
    ("value", "words"),
    [([3], "a list"), (3, "an int"), (int, "the class int"), (None, "None"), (OSError("gone"), "an OSError")],
    ids=repr,
)
def test_kind_of(value: object, words: str):
    assert kind_of(value) == words


def test_call_gives_the_result_and_names_who_raised_stop_iteration():
    assert call("the hook", max, 1, 2) == 2
    with pytest.raises(
        ContractError, match=r"^the hook raised StopIteration; .* Call next\(iterator, default\)"
    ) as caught:
        call("the hook", next, iter(()))
    assert isinstance(caught.value.__cause__, StopIteration)


def test_call_passes_any_other_error_through():
    with pytest.raises(ZeroDivisionError):
        call("the hook", lambda: 1 // 0)
