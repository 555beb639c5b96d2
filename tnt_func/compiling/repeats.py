"""A plan that is run again and again on what it has made, each time with a batch of its own.

Where inductor made a C++ function of the graph, the steps of a block are one call: C++ hands on what the step before
has made, and Python is given what each of them told when all are done.

References:
    torch._inductor.codecache.CppWrapperCodeCache, by which such a function is called from Python.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.compiling.plans import Plan, guarding
from tnt_func.compiling.templates import Parts, Source, giving, taking
from tnt_func.types import Batch, Output

Told: TypeAlias = tuple[Output, Mapping[str, Any] | None]
"""What is known of a step inside a block: its output, and its metrics where they changed."""
TOLD = ("output", "metrics")


class Repeat:
    """A plan that is run again on what it has made.

    Attributes:
        closed: sizes of batches of which it is known that it takes what it makes.
    """

    def __init__(self, plan: Plan):
        self.plan, self.closed = plan, set[Any]()
        self._span = plan.places.get("batch", range(0))
        self._take: Callable[[Parts], list[Any] | None] | None = None
        self._guards: dict[Any, Callable[..., bool]] = {}
        self._tell = giving({name: plan.made[name] for name in TOLD if name in plan.made})
        carried = [
            (place, *source)
            for name, (_, sources) in plan.made.items()
            if name in plan.places
            for place, source in zip(plan.places[name], sources, strict=False)
        ]
        self._new = [(place, where) for place, kind, where in carried if kind == "new"]
        self._old = [(place, where) for place, kind, where in carried if kind == "old" and where != place]
        changing = {place for place, _ in (*self._new, *self._old)}
        read = {where for name in TOLD if name in plan.made for kind, where in plan.made[name][1] if kind == "old"}
        self._chain: _Chain | None = None
        self._step = _function(plan) if read.isdisjoint(changing) else None

    def sizes(self, leaves: list[Any]) -> Any:
        """Of a batch, by the leaves that the plan took."""
        return tuple([leaves[at].shape for at in self._span if isinstance(leaves[at], Tensor)])

    def run(self, leaves: list[Any], batches: Sequence[Batch], each: bool) -> tuple[Parts, list[Told], int]:
        """What the last step made, what each step told or the last alone, and how many steps there were.

        They end before a batch that is not like the first.

        Args:
            leaves: that the plan took of the state and the first batch.
            batches: of the steps.
            each: whether each step is asked, not the last alone.
        """
        new = self.plan.execute(leaves)
        told = [_told(self._tell(new, leaves))]
        rows = self._rows(batches, leaves) if len(batches) > 1 else []
        if not rows:
            return self.plan.give(new, leaves), told, 1
        handed = self._handed_on(new, leaves)
        if self._step is None:
            new, leaves = self._one_by_one(handed, rows, told if each else None)
        else:
            if self._chain is None:
                self._chain = _Chain(self._step, self.plan, new, leaves, self._span, self._new, self._old)
            new, leaves = self._chain.run(handed, new, rows, told if each else None)
        if not each:
            told = [_told(self._tell(new, leaves))]
        return self.plan.give(new, leaves), told, 1 + len(rows)

    def _one_by_one(self, leaves: list[Any], rows: list[list[Any]], told: list[Told] | None) -> Any:
        new = list[Any]()
        for place, mine in enumerate(rows):
            leaves = self._handed_on(new, leaves) if place else leaves
            leaves[self._span.start : self._span.stop] = mine
            new = self.plan.execute(leaves)
            if told is not None:
                told.append(_told(self._tell(new, leaves)))
        return new, leaves

    def _handed_on(self, new: list[Any], last: list[Any]) -> list[Any]:
        """The leaves that the next step is given, but for those of its batch."""
        leaves = [*last]
        for place, where in self._new:
            leaves[place] = new[where]
        for place, where in self._old:
            leaves[place] = last[where]
        return leaves

    def _rows(self, batches: Sequence[Batch], leaves: list[Any]) -> list[list[Any]]:
        """The leaves of the batches after the first, up to one that is not like it in all that the plan looked at."""
        if not self._span:
            return [[]] * (len(batches) - 1)
        take = self._take = self._take or taking({"batch": batches[0]})
        first = leaves[self._span.start : self._span.stop]
        places = [place for place, leaf in enumerate(first) if isinstance(leaf, Tensor)]
        others = [(place, leaf) for place, leaf in enumerate(first) if not isinstance(leaf, Tensor)]
        sizes, rows = self.sizes(leaves), list[list[Any]]()
        if sizes not in self._guards:
            self._guards[sizes] = guarding([first[place] for place in places])
        guard = self._guards[sizes]
        for batch in batches[1:]:
            mine = take({"batch": batch})
            if mine is None or not guard(*(mine if not others else [mine[place] for place in places])):
                break
            if others and not all(trees.same_leaf(mine[place], leaf) for place, leaf in others):
                break
            rows.append(mine)
        return rows


def _told(known: Parts) -> Told:
    return known["output"], known.get("metrics")


class _Chain:
    """The steps of a plan that follow a first one, as one call of a C++ function.

    Args:
        step: the address of the C++ function.
        plan: that the function runs.
        new, leaves: what a first step made, and was given; of these it is known from now on which are tensors.
        span: of the batch among the leaves.
        by_new, by_old: pairs of a place among the leaves and of what it is next: a place among what is made, or given.
    """

    def __init__(
        self,
        step: int,
        plan: Plan,
        new: list[Any],
        leaves: list[Any],
        span: range,
        by_new: list[tuple[int, int]],
        by_old: list[tuple[int, int]],
    ):
        self._step, self._span, self._held = step, span, plan.held
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        number = {place: n for n, place in enumerate(self._places)}
        tensors, batch = len(self._places) + len(self._held), [place for place in span if place in number]
        # Of each tensor what it is at the next step: below `tensors` one of these, then what is made, then the batch.
        links = [*range(tensors)]
        for place, where in by_new:
            if place in number:
                links[number[place]] = tensors + where
        for place, where in by_old:
            if place in number:
                links[number[place]] = number[where]
        for n, place in enumerate(batch):
            links[number[place]] = tensors + len(new) + n
        used = [number[place] for place in plan.used] + [*range(len(self._places), tensors)]
        kept = sorted(
            {where for name in TOLD if name in plan.made for kind, where in plan.made[name][1] if kind == "new"}
        )
        self._kept = [where for where in kept if isinstance(new[where], Tensor)]
        self._batch = [place - span.start for place in batch]
        self._links = (ctypes.c_int64 * (3 + tensors + len(used) + len(self._kept)))(
            len(new), len(used), len(self._kept), *links, *used, *self._kept
        )
        self._reads_batch = False

        def source(kind: str, where: Any) -> Source:
            if kind == "new":
                return ("new", self._kept.index(where)) if where in self._kept else ("old", where)
            if kind == "old":
                self._reads_batch |= where in span
                return "old", len(new) + where
            return "constant", where

        self._tell = giving(
            {
                name: (tree, [source(*one) for one in sources])
                for name, (tree, sources) in plan.made.items()
                if name in TOLD
            }
        )

    def run(
        self, leaves: list[Any], first: list[Any], rows: list[list[Any]], told: list[Told] | None
    ) -> tuple[list[Any], list[Any]]:
        """What the last step made, and what it was given.

        Args:
            leaves: of the first of these steps, but for its batch.
            first: what the step before made; what is no tensor depends on sizes alone, and these are the same.
            rows: leaves of the batch of each step.
            told: what each step told is put there, if anywhere.
        """
        held: Any = torch._C._aoti  # pyright: ignore
        given = [leaves[place] for place in self._places] + self._held
        batches = [row[place] for row in rows for place in self._batch]
        handles = _library()(
            self._step,
            held.unsafe_alloc_void_ptrs_from_tensors(given),
            held.unsafe_alloc_void_ptrs_from_tensors(batches),
            self._links,
            len(rows),
            told is not None,
        )
        found = held.alloc_tensors_by_stealing_from_void_ptrs(handles)
        last = iter(found)
        if told is not None:
            old, start = [*first, *leaves], len(first) + self._span.start
            for row in rows:
                if self._reads_batch:
                    old[start : start + len(row)] = row
                told.append(_told(self._tell([*itertools.islice(last, len(self._kept))], old)))
        new = [next(last) if isinstance(was, Tensor) else (next(last), was)[1] for was in first]
        leaves[self._span.start : self._span.stop] = rows[-1]
        for place in self._places:
            leaves[place] = next(last)
        return new, leaves


def _function(plan: Plan) -> int | None:
    """The address of the C++ function that inductor has made of a plan's graph; None where it made none."""
    entry = getattr(plan.code, "__globals__", {}).get("inductor_entry")
    found = None if entry is None else getattr(ctypes.CDLL(entry.__self__.__file__), _STEP, None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value


_STEP = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
"""As C++ compilers write `inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*)`."""


@functools.cache
def _library() -> Callable[..., list[Any]]:
    """The C++ function below, compiled; a later process finds it in inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    class Linked(CppCodeCache):
        cpp_compile_command_flags = {"include_pytorch": True}

    library: Any = Linked.load(_SOURCE, needs_vec_isa=False)
    # It is called with the lock of Python held, for a step itself lets go of it.
    function = ctypes.PyDLL(library._name).repeated
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.py_object,
        ctypes.py_object,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_bool,
    ]
    function.restype = ctypes.py_object
    return function


_SOURCE = """
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

struct AtenTensorOpaque;
struct _object;
typedef AtenTensorOpaque* Handle;
typedef _object PyObject;
typedef void Step(Handle* given, Handle* made);

extern "C" {
int32_t aoti_torch_new_tensor_handle(Handle, Handle*);
int32_t aoti_torch_delete_tensor_object(Handle);
void* PyCapsule_GetPointer(PyObject*, const char*);
PyObject* PyCapsule_New(void*, const char*, void (*)(PyObject*));
PyObject* PyList_New(intptr_t);
PyObject* PyList_GetItem(PyObject*, intptr_t);
int PyList_SetItem(PyObject*, intptr_t, PyObject*);
intptr_t PyList_Size(PyObject*);
int PyErr_CheckSignals();
PyObject* PyErr_Occurred();
void PyErr_SetString(PyObject*, const char*);
extern PyObject* PyExc_RuntimeError;
}

struct Delete {
    void operator()(Handle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
typedef std::unique_ptr<AtenTensorOpaque, Delete> Tensor;

static Handle again(const Tensor& tensor) {
    Handle same = nullptr;
    aoti_torch_new_tensor_handle(tensor.get(), &same);
    return same;
}

static std::vector<Tensor> taken(PyObject* list) {
    std::vector<Tensor> tensors;
    for (intptr_t n = 0; n < PyList_Size(list); n++)
        tensors.emplace_back(static_cast<Handle>(PyCapsule_GetPointer(PyList_GetItem(list, n), nullptr)));
    return tensors;
}

extern "C" PyObject* repeated(Step* step, PyObject* first, PyObject* rows, const int64_t* numbers, int64_t steps,
                              bool each) {
    std::vector<Tensor> now = taken(first), batches = taken(rows), told;
    const int64_t count = now.size(), span = batches.size() / steps;
    const int64_t outputs = numbers[0], inputs = numbers[1], tells = numbers[2];
    const int64_t *links = numbers + 3, *used = links + count, *kept = used + inputs;
    std::vector<Tensor> next(count), made(outputs);
    std::vector<Handle> given(inputs), out(outputs);
    try {
        for (int64_t at = 0; at < steps; at++) {
            for (int64_t n = 0; n < count; n++) {
                const int64_t link = links[n];
                if (link >= count + outputs)
                    next[n] = std::move(batches[at * span + link - count - outputs]);
                else if (link != n && at > 0)
                    next[n].reset(again(link < count ? now[link] : made[link - count]));
            }
            for (int64_t n = 0; n < count; n++)
                if (next[n]) now[n] = std::move(next[n]);
            for (int64_t n = 0; n < inputs; n++) given[n] = again(now[used[n]]);
            step(given.data(), out.data());
            for (int64_t n = 0; n < outputs; n++) made[n].reset(out[n]);
            for (int64_t n = 0; each && n < tells; n++) told.emplace_back(again(made[kept[n]]));
            if (PyErr_CheckSignals() || PyErr_Occurred()) return nullptr;
        }
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    PyObject* result = PyList_New(told.size() + outputs + count);
    intptr_t place = 0;
    for (auto* tensors : {&told, &made, &now})
        for (auto& tensor : *tensors)
            PyList_SetItem(result, place++, PyCapsule_New(tensor.release(), nullptr, nullptr));
    return result;
}
"""
