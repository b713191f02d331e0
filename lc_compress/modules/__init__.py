"""Modules that run from packed weights: `Linear`, `Conv1d`, `Conv2d` and `Embedding` hold the bytes
of a part's state, and unpack them by a policy (`PackedWeight`).

`compress_module` makes one, `replace_modules` swaps those of a model in place, `to_dense` gives the
plain modules back.
"""

from .layers import Conv1d as Conv1d
from .layers import Conv2d as Conv2d
from .layers import Embedding as Embedding
from .layers import Linear as Linear
from .layers import PackedModule as PackedModule
from .packed import Packed as Packed
from .packed import as_bytes as as_bytes
from .packed import pack as pack
from .replacing import PackedState as PackedState
from .replacing import check_replaceable as check_replaceable
from .replacing import compress_module as compress_module
from .replacing import replace_modules as replace_modules
from .replacing import replace_tensor as replace_tensor
from .replacing import to_dense as to_dense
from .replacing import unpack_all as unpack_all
from .weight import Materialize as Materialize
from .weight import PackedWeight as PackedWeight
