"""pbjax: trained neural networks at any precision, on packed 1-bit weights (PrecisionBatching, arXiv 2003.00822)."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pallas_kernels.bit_matmul.contract import Problem as Problem
from pallas_kernels.bit_matmul.contract import Unsupported as Unsupported
from pbjax import files as files
from pbjax._allocation.allocate import allocate as allocate
from pbjax._allocation.outcome import Allocation as Allocation
from pbjax._allocation.outcome import AllocationRow as AllocationRow
from pbjax._allocation.outcome import UniformRow as UniformRow
from pbjax._allocation.seconds import product_seconds as product_seconds
from pbjax._backends import Selection as Selection
from pbjax._backends import select_backend as select_backend
from pbjax._backends import use_backend as use_backend
from pbjax._bit_tensor import BitTensor as BitTensor
from pbjax._matmul import matmul as matmul
from pbjax._packed import Dequantized as Dequantized
from pbjax._quantize import dequantize as dequantize
from pbjax._quantize import quantize as quantize
from pbjax._quantize import truncate as truncate
from pbjax._quantize import with_bitlayers as with_bitlayers
from pbjax._quantized import DequantizedWarning as DequantizedWarning
from pbjax._quantized import quantized as quantized
from pbjax._report import Report as Report
from pbjax._report import ReportRow as ReportRow
from pbjax._report import report as report
from pbjax._specs import Spec as Spec
from pbjax._sweep import sweep as sweep
from pbjax.files._load import load as load
from pbjax.files._save import save as save

if TYPE_CHECKING:
    from pbjax import linen as linen
    from pbjax import nnx as nnx
    from pbjax import plot as plot


def __getattr__(name: str) -> ModuleType:
    """`linen`, `nnx` and `plot`, imported when first asked for, with Flax and with Matplotlib."""
    if name in ("linen", "nnx", "plot"):
        return importlib.import_module(f"pbjax.{name}")
    raise AttributeError(f"module 'pbjax' has no attribute {name!r}")
