"""Compress the weights of a PyTorch model as a sum of separately compressed parts, learned with the
LC algorithm.
"""

from .batchnorm import recalibrate as recalibrate
from .binary import Binary as Binary
from .binary import Ternary as Ternary
from .codebook import FixedCodebook as FixedCodebook
from .codebook import KMeans as KMeans
from .codebook import PowersOfTwo as PowersOfTwo
from .compose import Over as Over
from .compose import Sum as Sum
from .compose import Then as Then
from .compose import each as each
from .formats import Int as Int
from .l1 import L1Ball as L1Ball
from .l1 import L1Penalty as L1Penalty
from .lc import LC as LC
from .lc import Step as Step
from .low_rank import LowRank as LowRank
from .metrics import Report as Report
from .nm import NM as NM
from .part import Coding as Coding
from .part import Field as Field
from .part import Ops as Ops
from .part import Part as Part
from .rank_selection import RankSelection as RankSelection
from .scaled import ScaledCodebook as ScaledCodebook
from .schedules import constant as constant
from .schedules import geometric as geometric
from .selection import Joint as Joint
from .sparse import Sparse as Sparse
from .sparse import SparsePenalty as SparsePenalty
from .storage import FormatError as FormatError
from .storage import inspect as inspect
from .storage import load as load
from .storage import save as save
from .structured import BlockPenalty as BlockPenalty
from .structured import BlockSparse as BlockSparse
from .structured import GroupL2Penalty as GroupL2Penalty
from .views import KernelMatrix as KernelMatrix
from .views import Matrix as Matrix
from .views import Vector as Vector
from .views import View as View
