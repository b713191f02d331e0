"""How sparsity and quantization interact: which order, and whether their harms add up."""

from .calibrated import Dots as Dots
from .orders import Errors as Errors
from .orders import Orders as Orders
from .orthogonality import Combined as Combined
from .orthogonality import Difference as Difference
from .orthogonality import Interval as Interval
from .orthogonality import Orthogonality as Orthogonality
from .orthogonality import orthogonality as orthogonality
from .report import LayerReport as LayerReport
from .report import OrderReport as OrderReport
from .report import order_report as order_report
