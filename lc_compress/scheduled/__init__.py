"""Weights and activations on a schedule: parts switched on, ramped and frozen during training.

`insert` puts modules for activations into a model, a `Plan` says when what begins, `Scheduled` acts
on it while the user trains.
"""

from .controller import Scheduled as Scheduled
from .controller import ScheduledReport as ScheduledReport
from .inserting import insert as insert
from .plan import Cubic as Cubic
from .plan import Delay as Delay
from .plan import Plan as Plan
from .plan import prune_then_quantize as prune_then_quantize
from .plan import quantize_then_prune as quantize_then_prune
from .plan import together as together
from .pruner import ActivationPruner as ActivationPruner
from .quantizer import ActivationQuantizer as ActivationQuantizer
