"""Observers: what watches a run and has effects. None of them can change it (law 6)."""

from tnt_func.observers.checkpointer import Checkpointer as Checkpointer
from tnt_func.observers.checkpointer import checkpointer as checkpointer
from tnt_func.observers.combinators import Openable as Openable
from tnt_func.observers.combinators import every as every
from tnt_func.observers.combinators import isolate as isolate
from tnt_func.observers.combinators import on as on
from tnt_func.observers.combinators import rank_zero as rank_zero
from tnt_func.observers.combinators import tee as tee
from tnt_func.observers.combinators import when as when
from tnt_func.observers.console import console as console
from tnt_func.observers.csv_writer import csv_writer as csv_writer
from tnt_func.observers.history import History as History
from tnt_func.observers.jsonl_writer import jsonl_writer as jsonl_writer
from tnt_func.observers.jsonl_writer import read_jsonl as read_jsonl
from tnt_func.observers.machine import gpu as gpu
from tnt_func.observers.machine import system as system
from tnt_func.observers.measures import Measure as Measure
from tnt_func.observers.measures import throughput as throughput
from tnt_func.observers.measures import timing as timing
from tnt_func.observers.predictions import predictions as predictions
from tnt_func.observers.progress_bar import progress_bar as progress_bar
from tnt_func.observers.recorder import recorder as recorder
from tnt_func.observers.rows import Row as Row
from tnt_func.observers.rows import Writer as Writer
from tnt_func.observers.tensorboard_writer import tensorboard_writer as tensorboard_writer
