"""Files of weights beyond `pbjax.save` and `pbjax.load`: conversion, inspection, and the error that all raise.

`python -m pbjax` has the same as commands.
"""

from pbjax._convert import convert as convert
from pbjax._convert import truncate as truncate
from pbjax._files import FileError as FileError
from pbjax._inspect import Info as Info
from pbjax._inspect import LeafInfo as LeafInfo
from pbjax._inspect import info as info
from pbjax._inspect import verify as verify
