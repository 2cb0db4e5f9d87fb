"""The instructions that the loops are written in, and their compilation by LLVM."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from smallbatch_jax.models.native.processor import AVX512, Processor, host_features

INT64, INT32, FLOAT, POINTER = ir.IntType(64), ir.IntType(32), ir.FloatType(), ir.PointerType()

Vector = Any  # a value of LLVM, of `lanes` float32
Accumulator = Any  # the address of a vector that LLVM keeps in a register

_engines: list[Any] = []  # own the machine code, which XLA may call until the process ends


@dataclass(frozen=True)
class Integer:
    """An int64 of the generated code, with Python's operators; the other operand may be an int."""

    build: ir.IRBuilder
    value: Any

    def _apply(self, instruction: str, other: "Index") -> "Integer":
        return Integer(self.build, getattr(self.build, instruction)(self.value, operand(other)))

    __add__ = __radd__ = partialmethod(_apply, "add")
    __sub__ = partialmethod(_apply, "sub")
    __mul__ = __rmul__ = partialmethod(_apply, "mul")

    def __rsub__(self, other: int) -> "Integer":
        return self * -1 + other

    def ceil_div(self, divisor: int) -> "Integer":
        """Returns ⌈self / divisor⌉ if self is not negative, else an integer below 1."""
        return self if divisor == 1 else (self + (divisor - 1))._apply("sdiv", divisor)

    def at_least(self, bound: "Index") -> "Integer":
        return self._select(">", bound)

    def at_most(self, bound: "Index") -> "Integer":
        return self._select("<", bound)

    def _select(self, comparison: str, other: "Index") -> "Integer":
        condition = self.build.icmp_signed(comparison, self.value, operand(other))
        return Integer(self.build, self.build.select(condition, self.value, operand(other)))


Index = Integer | int


def operand(value: Index) -> Any:
    return ir.Constant(INT64, value) if isinstance(value, int) else value.value


@dataclass(frozen=True)
class Pointer:
    """The address of a float32; `pointer + offset` advances by elements."""

    build: ir.IRBuilder
    value: Any

    def __add__(self, offset: Index) -> "Pointer":
        return Pointer(self.build, self.build.gep(self.value, [operand(offset)], source_etype=FLOAT))


class Routine:
    """The C function `void name(int64_t images, float *a, float *b, float *c)`, under construction."""

    def __init__(self, name: str, processor: Processor):
        self.processor = processor
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [INT64, *[POINTER] * 3]), name)
        self.function.attributes.add("noinline")  # otherwise LLVM compiles it twice, here and inside the handler
        self.build = ir.IRBuilder(self.function.append_basic_block("entry"))
        n, *pointers = self.function.args
        self.images, self.arrays = Integer(self.build, n), [Pointer(self.build, pointer) for pointer in pointers]
        self.vector = ir.VectorType(FLOAT, processor.lanes)
        self.zeros = ir.Constant(self.vector, [0.0] * processor.lanes)
        of_vectors = ir.FunctionType(self.vector, [self.vector] * 3)
        self._fma = ir.Function(self.module, of_vectors, f"llvm.fma.v{processor.lanes}f32")

    @contextmanager
    def loop(self, start: Index, stop: Index, step: int = 1) -> Iterator[Integer]:
        """Generates `for (index = start; index < stop; index += step)` around the code written inside the context."""
        before, head = self.build.block, self.function.append_basic_block("head")
        body, after = self.function.append_basic_block("body"), self.function.append_basic_block("after")
        self.build.branch(head)
        self.build.position_at_end(head)
        phi: Any = self.build.phi(INT64)
        phi.add_incoming(operand(start), before)
        self.build.cbranch(self.build.icmp_signed("<", phi, operand(stop)), body, after)
        self.build.position_at_end(body)
        index = Integer(self.build, phi)
        yield index
        phi.add_incoming((index + step).value, self.build.block)
        self.build.branch(head)
        self.build.position_at_end(after)

    def accumulator(self) -> Accumulator:
        """Returns a new accumulator of zeros."""
        with self.build.goto_entry_block():
            accumulator = self.build.alloca(self.vector)
        self.build.store(self.zeros, accumulator)
        return accumulator

    def add_product(self, accumulator: Accumulator, a: Vector, b: Vector) -> None:
        """Adds a·b to an accumulator, rounding once."""
        self.build.store(self.build.call(self._fma, [a, b, self.get(accumulator)]), accumulator)

    def get(self, accumulator: Accumulator) -> Vector:
        return self.build.load(accumulator, typ=self.vector)

    def load(self, source: Pointer) -> Vector:
        return self.build.load(source.value, align=4, typ=self.vector)

    def store(self, vector: Vector, target: Pointer) -> None:
        self.build.store(vector, target.value, align=4)

    def broadcast(self, source: Pointer) -> Vector:
        """Returns a vector filled with the element at this address."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        element = self.build.load(source.value, align=4, typ=FLOAT)
        first = self.build.insert_element(undefined, element, ir.Constant(INT32, 0))
        return self.build.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, self.processor.lanes), None))


def machine_code(code: Routine, name: str) -> int:
    """Compiles a routine's module for this processor; returns the address of its function of that name."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = host_features()
    features.update({flag: False for flag in features if flag.startswith("avx512") and code.processor != AVX512})
    flags = f"{features.flatten()},-prefer-256-bit" if features else ""  # otherwise LLVM splits wide vectors on some x86
    host = llvm.Target.from_default_triple()
    target = host.create_target_machine(cpu=llvm.get_host_cpu_name(), features=flags, opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(optimised(code, target), target)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(name)


def optimised(code: Routine, target: llvm.TargetMachine) -> llvm.ModuleRef:
    """Finishes a routine and returns its module, optimised by LLVM for a target machine."""
    code.build.ret_void()
    module = llvm.parse_assembly(str(code.module))
    module.verify()
    # The loops are tiled already: unrolling or vectorising them again would need more registers than there are.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.slp_vectorization = options.loop_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    return module
