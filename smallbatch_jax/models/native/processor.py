"""The vector units that machine code can be generated for."""

import platform
from typing import Any, NamedTuple

X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")  # names that operating systems give to the two architectures


class Processor(NamedTuple):
    """The properties of a vector unit that the loops depend on."""

    machines: tuple[str, ...]  # platform.machine() in lower case
    flags: tuple[str, ...]  # optional CPU features that it needs, by LLVM's names
    lanes: int  # float32 elements of a vector register
    registers: int  # vector registers
    accumulators: int  # registers that hold sums of a correlation; with more, LLVM keeps some of the sums in memory


AVX512 = Processor(X86, ("avx512f", "avx512vl"), lanes=16, registers=32, accumulators=24)
AVX2 = Processor(X86, ("avx2", "fma"), lanes=8, registers=16, accumulators=12)
NEON = Processor(ARM, (), lanes=4, registers=32, accumulators=20)  # part of every 64-bit ARM processor
PROCESSORS = (AVX512, AVX2, NEON)  # a machine uses the first that it has


def processor() -> Processor | None:
    """Returns this machine's vector unit; None if none is supported."""
    machine, flags = platform.machine().lower(), host_features()
    return next((p for p in PROCESSORS if machine in p.machines and all(flags.get(flag) for flag in p.flags)), None)


def host_features() -> Any:
    """Returns LLVM's map of the optional features of this CPU; empty except on x86, because the loops use none elsewhere."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_features() if platform.machine().lower() in X86 else llvm.FeatureMap()
