"""Data for the loop: any iterable, a function of the epoch, or a pipeline that seeks."""

from tnt_func.data.cursors import Cursor as Cursor
from tnt_func.data.cursors import batches as batches
