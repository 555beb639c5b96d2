"""Observers: what watches a run and has effects. None of them can change it (law 6)."""

from tnt_func.observers.checkpointer import Checkpointer as Checkpointer
from tnt_func.observers.checkpointer import checkpointer as checkpointer
