"""The processor that machine code is made for."""

import platform
from functools import cache
from typing import NamedTuple


class Processor(NamedTuple):
    """What a routine is written for."""

    lanes: int  # float32 numbers in a vector
    registers: int  # vectors that it holds


WIDE, NARROW = Processor(16, 32), Processor(8, 16)  # AVX-512; AVX2


@cache
def processor() -> Processor | None:
    """The processor at hand; None if it is one for which nothing is written: not x86-64, or without AVX2 and fused products."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        import llvmlite.binding as llvm
    except ImportError:  # not needed beside a GPU
        return None
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return WIDE
    return NARROW if features.get("avx2") and features.get("fma") else None
