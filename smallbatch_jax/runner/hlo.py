"""Costs of one training step, read from the text of a segment that XLA compiled for a GPU or TPU."""

import math
import re
from dataclasses import dataclass, field

# Operations that launch work on the device.
LAUNCHED = {
    *("concatenate", "convolution", "copy", "copy-start", "custom-call", "dot", "dynamic-slice", "dynamic-update-slice"),
    *("fusion", "reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "transpose"),
}
SLICES = {"dynamic-slice", "slice", "gather"}
BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")


@dataclass
class Cost:
    """Cost of a computation's operations; the body of a loop is included once per iteration."""

    kernels: list[float] = field(default_factory=list)  # bytes read and written by each
    written: float = 0.0  # bytes
    cycles: float = 0.0  # estimated by the TPU compiler

    def add(self, other: "Cost", times: int = 1) -> None:
        self.kernels += other.kernels * times
        self.written += other.written * times
        self.cycles += other.cycles * times


class Module:
    """Computations of an optimised program, by name."""

    def __init__(self, text: str):
        self._computations: dict[str, list[tuple[str, str, str, str]]] = {}
        self._shapes: dict[str, str] = {}
        lines: list[tuple[str, str, str, str]] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                lines = self._computations.setdefault(head.group(1), [])
            elif found := _INSTRUCTION.match(line.strip()):
                name, shape, operation, rest = found.groups()
                lines.append((name, shape, operation, rest))
                self._shapes[name] = shape

    def step(self) -> Cost:
        """Returns the cost of one training step: the body of the outermost loop with the most operations."""
        bodies = {
            name: [_called(rest, "body") for *_, operation, rest in lines if operation == "while"]
            for name, lines in self._computations.items()
        }
        nested = {inner for body in set().union(*bodies.values()) for inner in bodies[body]}
        outermost = [body for found in bodies.values() for body in found if body not in nested]
        return self._cost(max(outermost, key=lambda name: len(self._computations[name])))

    def _cost(self, name: str) -> Cost:
        total = Cost()
        for _, shape, operation, rest in self._computations.get(name, []):
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', rest):
                total.cycles += int(cycles.group(1))
            if operation == "while":
                total.add(self._cost(_called(rest, "body")), self._iterations(rest))
            elif operation == "call":
                total.add(self._cost(_called(rest, "to_apply")))
            elif operation in LAUNCHED:
                total.kernels.append(_bytes(shape) + self._read(rest))
                total.written += _bytes(shape)
        return total

    def _read(self, rest: str) -> int:
        """Returns the bytes of an operation's operands; an operand that a fusion only slices adds the bytes of the slices."""
        body = self._computations.get(_called(rest, "calls"), [])
        total = 0
        for position, operand in enumerate(_operands(rest)):
            same, uses = set(), []  # names of the operand within the fusion and of values made from it
            for name, shape, operation, text in body:
                if operation == "parameter" and text.startswith(f"{position})"):
                    same.add(name)
                elif same.intersection(_operands(text)):
                    same.update([name] if operation == "bitcast" else [])
                    uses += [] if operation == "bitcast" else [(shape, operation)]
            sliced = bool(uses) and all(operation in SLICES for _, operation in uses)
            total += sum(_bytes(shape) for shape, _ in uses) if sliced else _bytes(self._shapes.get(operand, ""))
        return total

    def _iterations(self, loop: str) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
            return int(known.group(1))
        bounds = [
            rest for *_, operation, rest in self._computations.get(_called(loop, "condition"), []) if operation == "constant"
        ]
        return max((int(value) for rest in bounds for value in re.findall(r"^(\d+)\)", rest)), default=1)


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split(")")[0])


def _called(rest: str, role: str) -> str:
    """Returns the name of the computation that an operation calls in a role."""
    found = re.search(rf"\b{role}=%?([\w.\-]+)", rest)
    return found.group(1) if found else ""


def _bytes(shape: str) -> int:
    """Returns the bytes of an array or a tuple of arrays, written as in `f32[13,64]{1,0}`."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in found)
