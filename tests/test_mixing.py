"""Several pipelines as one."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import tnt_func as tnt
from tnt_func.data import Elements, mix, source
from tnt_func.data.mixing import stretches
from tnt_func.errors import UsageError

KEY = tnt.key(0)
LENGTHS = [(3, 2), (2, 3), (1, 4), (4, 1), (2, 2), (3, 1, 5), (5, 4, 2), (1, 1, 1)]


def members(lengths: tuple[int, ...]) -> dict[str, Elements]:
    return {name: source([f"{name}{index}" for index in range(n)]) for name, n in zip("abc", lengths, strict=False)}


def given(elements: Elements, epoch: int = 0) -> list[Any]:
    return list(elements.batches(epoch))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("how", "stop"),
    [
        ("in_order", "longest"),
        *(("round_robin", stop) for stop in ("longest", "shortest")),  # there it restarts no member
        *(("all", stop) for stop in ("longest", "shortest", "restart")),
    ],
)
def test_the_order_is_that_of_torchtnt(how: Any, stop: Any, lengths: tuple[int, ...]):
    iterators = pytest.importorskip("torchtnt.utils.data.iterators", reason="needs the oracle extra: torchtnt")
    ways = iterators.StoppingMechanism
    way = {
        "longest": ways.ALL_DATASETS_EXHAUSTED,
        "shortest": ways.SMALLEST_DATASET_EXHAUSTED,
        "restart": ways.RESTART_UNTIL_ALL_DATASETS_EXHAUSTED,
    }[stop]
    strategies = {"round_robin": iterators.RoundRobin, "all": iterators.AllDatasetBatches}
    strategy = iterators.InOrder() if how == "in_order" else strategies[how](stopping_mechanism=way)
    parts = {name: given(elements) for name, elements in members(lengths).items()}
    theirs: Iterator[Any] = iterators.DataIterationStrategyRegistry.get(strategy)(parts, strategy)
    assert given(mix(members(lengths), how, stop=stop)) == list(theirs)


def test_members_begin_anew_with_the_draws_of_their_next_epoch():
    numbers, two = source(range(6)), source(range(2)).shuffle(KEY)
    together = mix({"a": numbers, "b": two}, "all", stop="restart")
    assert len(together) == 6
    for epoch in (0, 1):
        turns = [element["b"] for element in given(together, epoch)]
        assert turns == [*given(two, 3 * epoch), *given(two, 3 * epoch + 1), *given(two, 3 * epoch + 2)]
    alternating = mix({"a": numbers, "b": two}, "round_robin", stop="restart")
    assert [*map(list, given(alternating))] == [["a"], ["b"]] * 6
    assert [element["b"] for element in given(alternating, 1) if "b" in element] == [
        *(element["b"] for element in given(together, 1))
    ]


@pytest.mark.parametrize("how", ["round_robin", "weighted", "all"])
def test_a_number_of_elements_may_be_asked_for(how: Any):
    more: dict[str, Any] = {"weights": {"a": 3, "b": 1}, "key": KEY} if how == "weighted" else {}
    mixed = mix(members((3, 2)), how, stop=9, **more)
    counts = Counter(name for element in given(mixed) for name in element)
    assert len(given(mixed)) == len(mixed) == 9
    assert counts == {"round_robin": {"a": 5, "b": 4}, "weighted": {"a": 7, "b": 2}, "all": {"a": 9, "b": 9}}[how]


def test_weighted_is_in_proportion_and_random_and_complete():
    big, small = source(range(300)), source(range(100))
    mixed = mix({"big": big, "small": small}, "weighted", weights={"big": 1, "small": 1}, key=KEY)
    drawn = given(mixed)
    assert Counter(str(element) for element in drawn) == Counter(
        [*(str({"big": x}) for x in range(300)), *(str({"small": x}) for x in range(100))]
    )
    early = Counter(name for element in drawn[:100] for name in element)
    assert 30 < early["small"] < 70 and all("big" in element for element in drawn[200:])
    assert drawn != given(mixed, 1)
    shortest = mix({"big": big, "small": small}, "weighted", weights={"big": 2, "small": 1}, key=KEY, stop="shortest")
    assert Counter(name for element in given(shortest) for name in element) == {"big": 200, "small": 100}
    restarted = mix({"big": big, "small": small}, "weighted", weights={"big": 1, "small": 1}, key=KEY, stop="restart")
    assert Counter(name for element in given(restarted) for name in element) == {"big": 300, "small": 300}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 3), (0.1, 7, 2)], ids=str)
def test_until_the_longest_has_ended_everything_comes_once(lengths: tuple[int, ...], weights: tuple[float, ...]):
    found = stretches("weighted", lengths, weights[: len(lengths)], "longest")
    assert tuple(map(sum, zip(*found, strict=True))) == lengths
    assert len(found) <= len(lengths)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (({}, "all"), {}, "there is something to mix"),
        ((members((1, 1)), "weighted"), {"weights": {"a": 1, "b": 1}}, "belong to 'weighted'.* Write mix"),
        ((members((1, 1)), "all"), {"key": KEY}, "belong to 'weighted'"),
        ((members((1, 1)), "weighted"), {"weights": {"a": 1}, "key": KEY}, "every member has a positive weight"),
        (
            (members((1, 1)), "weighted"),
            {"weights": {"a": 1, "b": 0}, "key": KEY},
            "every member has a positive weight",
        ),
        ((members((1, 1)), "in_order"), {"stop": "shortest"}, "each to its end. Write stop='longest'"),
        ((members((1, 1)), "all"), {"stop": 0}, r"mix\(..., stop=0\) was given; it is a positive number"),
    ],
)
def test_wrong_use_is_told(arguments: Any, options: Any, said: str):
    with pytest.raises(UsageError, match=said):
        mix(*arguments, **options)
