"""Laws of trees: what goes apart comes together, mapping is a functor, and `equal`, `diff` and `==` of paths agree."""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given

from tnt_func import pytree as trees
from tnt_func.pytree import pytree


@pytree(static=("name",))
@dataclass(frozen=True)
class Node:
    left: Any
    right: Any
    name: str


floats = st.floats(width=32)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
tensors = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.one_of(
        st.integers(-3, 3).map(float), floats.filter(lambda x: abs(x) < 2**31), st.lists(st.just(0.0), max_size=3)
    ),
    dtypes,
)
leaves = st.one_of(tensors, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
keys = st.one_of(st.text(max_size=3), st.integers(0, 3))


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inside, max_size=3),
        st.lists(inside, max_size=3).map(tuple),
        st.dictionaries(keys, inside, max_size=3),
        st.builds(Node, inside, inside, st.sampled_from("ab")),
    )


forests = st.recursive(leaves, containers, max_leaves=8)


@given(forests)
def test_unflatten_undoes_flatten(tree: Any):
    again = trees.unflatten(*trees.flatten(tree))
    assert trees.equal(again, tree)
    assert trees.structure(again) == trees.structure(tree)
    assert all(a is b for a, b in zip(trees.leaves(again), trees.leaves(tree), strict=True))


@given(forests)
def test_mapping_the_identity_is_the_identity(tree: Any):
    assert trees.equal(trees.map(lambda leaf: leaf, tree), tree)


@given(forests)
def test_mapping_twice_is_mapping_the_composition(tree: Any):
    def f(leaf: Any) -> str:
        return f"f({leaf!r})"

    def g(leaf: Any) -> str:
        return f"g({leaf!r})"

    assert trees.equal(trees.map(lambda leaf: f(g(leaf)), tree), trees.map(f, trees.map(g, tree)))


@given(forests)
def test_mapping_side_by_side_keeps_places(tree: Any):
    marked = trees.unflatten(trees.paths(tree), trees.structure(tree))
    pairs = trees.map(lambda leaf, path: (path, leaf), tree, marked)
    flat, _ = trees.flatten(trees.map(lambda path, leaf: path, marked, tree))
    assert flat == trees.paths(tree)
    assert trees.leaves(pairs) == [
        part for pair in trees.named_leaves(tree) for part in (pair[0], *trees.leaves(pair[1]))
    ]


@given(forests)
def test_every_path_is_one_leaf_and_leads_to_it(tree: Any):
    paths = trees.paths(tree)
    assert len(set(paths)) == len(paths)
    assert all(trees.at(tree, path) is leaf for path, leaf in trees.named_leaves(tree))
    assert all(eval(f"tree{path}", {"tree": tree}) is leaf for path, leaf in trees.named_leaves(tree))


@given(forests)
def test_a_copy_is_equal_and_has_no_difference(tree: Any):
    copy = trees.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)
    assert trees.equal(tree, copy) and trees.equal(copy, tree)
    assert trees.diff(tree, copy) == []


@given(forests, forests)
def test_trees_are_equal_exactly_where_they_have_no_difference(a: Any, b: Any):
    assert trees.equal(a, b) == (trees.diff(a, b) == []) == trees.equal(b, a)


@given(forests, st.data())
def test_one_changed_leaf_is_the_one_difference(tree: Any, data: st.DataObject):
    flat, structure = trees.flatten(tree)
    if flat:
        place = data.draw(st.integers(0, len(flat) - 1))
        flat[place] = data.draw(leaves.filter(lambda leaf: not trees.same_leaf(leaf, flat[place])))
        changed = trees.unflatten(flat, structure)
        assert not trees.equal(tree, changed)
        (line,) = trees.diff(tree, changed)
        assert line.startswith(f"tree{trees.paths(tree)[place]}: ")
