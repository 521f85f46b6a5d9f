"""Files of weights beyond `pbjax.save` and `pbjax.load`: conversion, inspection, and the error that all raise.

`python -m pbjax` has the same as commands.
"""

from pbjax.files._convert import convert as convert
from pbjax.files._convert import truncate as truncate
from pbjax.files._inspect import Info as Info
from pbjax.files._inspect import LeafInfo as LeafInfo
from pbjax.files._inspect import info as info
from pbjax.files._inspect import verify as verify
from pbjax.files._layout import FileError as FileError
