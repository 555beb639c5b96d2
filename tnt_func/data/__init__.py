"""Data for the loop: any iterable, a function of the epoch, or a pipeline that seeks."""

from tnt_func.data.cursors import Cursor as Cursor
from tnt_func.data.cursors import batches as batches
from tnt_func.data.loading import Loader as Loader
from tnt_func.data.loading import loader as loader
from tnt_func.data.pipelines import Elements as Elements
from tnt_func.data.pipelines import mix as mix
from tnt_func.data.sources import mapped as mapped
from tnt_func.data.sources import source as source
