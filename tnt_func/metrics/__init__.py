"""Metrics are monoids: nothing seen, one step seen, and how two of them merge.

A unit names its metrics; the loop merges one accumulator per step, right after the step, and empties them when an epoch
opens. Those below read entries of the step's output by name. `from_torchmetrics` makes one of any torchmetrics metric
whose state has a fixed shape; `accuracy`, `auroc` and the like are made by it.

Example:
    >>> loss = mean("loss", weight="num_samples")
    >>> a, b = loss.of({"loss": 1.0, "num_samples": 1}), loss.of({"loss": 4.0, "num_samples": 2})
    >>> loss.empty().merge(a).merge(b).value()
    tensor(3., dtype=torch.float64)
"""

from tnt_func.metrics.accumulators import Accumulator as Accumulator
from tnt_func.metrics.accumulators import Last as Last
from tnt_func.metrics.accumulators import Maximum as Maximum
from tnt_func.metrics.accumulators import Mean as Mean
from tnt_func.metrics.accumulators import Metric as Metric
from tnt_func.metrics.accumulators import Minimum as Minimum
from tnt_func.metrics.accumulators import Total as Total
from tnt_func.metrics.accumulators import compute as compute
from tnt_func.metrics.accumulators import entry as entry
from tnt_func.metrics.accumulators import last as last
from tnt_func.metrics.accumulators import maximum as maximum
from tnt_func.metrics.accumulators import mean as mean
from tnt_func.metrics.accumulators import minimum as minimum
from tnt_func.metrics.accumulators import total as total
from tnt_func.metrics.classification import accuracy as accuracy
from tnt_func.metrics.classification import auroc as auroc
from tnt_func.metrics.classification import confusion_matrix as confusion_matrix
from tnt_func.metrics.classification import f1 as f1
from tnt_func.metrics.classification import perplexity as perplexity
from tnt_func.metrics.classification import top_k_accuracy as top_k_accuracy
from tnt_func.metrics.from_torchmetrics import from_torchmetrics as from_torchmetrics
