"""One packed file that is the whole model: `save`, `load`, `inspect`."""

from .container import FormatError as FormatError
from .inspection import FileReport as FileReport
from .inspection import inspect as inspect
from .inspection import verify as verify
from .loading import load as load
from .loading import to_dense as to_dense
from .saving import save as save
