"""Exact C steps for pairs of parts inside a sum, one file per kind of pair."""

from . import binary_sparse as binary_sparse
from . import codebook_sparse as codebook_sparse
from . import kmeans_sparse as kmeans_sparse
from . import low_rank_sparse as low_rank_sparse
from . import shared_support as shared_support
from . import sparse_format as sparse_format
from .registry import Joint as Joint
from .registry import find as find
from .registry import find_then as find_then
from .registry import register as register
from .registry import register_then as register_then
