"""A launch's loops, bytes and matmuls, computed from Triton's intermediate representation (TTIR) and the launch's arguments.

`evaluate` runs the scalar integer arithmetic of one program, that in the middle of the grid, and skips everything on tensors.
So the turns of every loop are those that the GPU would take, whatever a kernel's source looks like, and no kernel needs to
declare them. A loop whose turns depend on data in memory is an error.

A scalar is (value, base). Numbers with the same base differ by a constant that the compiler knows, so a loop between two of
them may be unrolled; constants have the base None.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastsd_kernels.launch import Launch

Scalar = tuple[int, str | None]

_LOCATION = re.compile(r"\s+loc\(.*\)$")
_OPERATION = re.compile(r"(?:(%[\w.]+)(?::\d+)? = )?\"?([a-z_]+\.[a-z_0-9.]+)\"?(.*)")
_VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
_INITIAL = re.compile(r"(%[\w.]+) = (%[\w.]+(?:#\d+)?)")
_TILE = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?([a-z]+\d+[A-Za-z0-9]*)")
_ARGUMENT = re.compile(r"(%\w+): ([^,{]+?)(?: \{[^}]*\})?(?= loc|,|\))")
_MOST_TURNS = 1_000_000

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "remsi": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "maxsi": max,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
}


class Operation(NamedTuple):
    """One line of TTIR, with the regions that belong to it."""

    result: str | None
    name: str
    text: str
    regions: list[list[Operation]]


class Loop(NamedTuple):
    """A loop of the source: its turns for each turn of the loop around it, 0 if a program does not reach it."""

    turns: int
    unrollable: bool  # the compiler knows the turns
    inner: list[Loop]


class Work(NamedTuple):
    """The work of a launch as its source describes it. Bytes and FLOPs are those of all programs together."""

    loops: list[Loop]
    loaded: int  # bytes asked for by loads, each tile whole and as often as it is read
    stored: int
    device: int  # bytes to and from device memory if each argument is read once and written once
    flops: int  # of matmuls on whole tiles


def evaluate(ttir: str, launch: Launch) -> Work:
    """Compute the work of a launch whose kernel has this TTIR.

    Raises:
        ValueError: a loop's turns depend on data, or arithmetic that is not known here.
    """
    lines = iter([_LOCATION.sub("", line).strip() for line in ttir.splitlines() if not line.startswith("#")])
    header = next(line for line in lines if line.startswith("tt.func"))
    program = _Program(launch, [name[1:] for name, _ in _ARGUMENT.findall(header)])
    loops = program.run(_block(lines), 1)
    programs = 1
    for extent in launch.grid:
        programs *= extent
    sizes = {name: x.numel() * x.itemsize for name, x in program.tensors.items()}
    # A pointer that is itself read from memory has no argument: its bytes count as often as they are asked for.
    moved = [*program.read.items(), *program.written.items()]
    device = sum(sizes.get(name, count * programs) for name, count in moved)
    loaded, stored = (programs * sum(moved.values()) for moved in (program.read, program.written))
    return Work(loops, loaded, stored, device, programs * program.flops)


def _block(lines: object) -> list[Operation]:
    """Parse lines up to the end of their region."""
    operations: list[Operation] = []
    for line in lines:  # type: ignore[attr-defined]
        if line.startswith("}"):
            if line.endswith("{"):  # "} else {", "} do {"
                operations.append(Operation(None, "next", "", []))
                continue
            break
        if match := _OPERATION.match(line):
            regions = _split(_block(lines)) if line.endswith("{") else []
            operations.append(Operation(match[1], match[2], match[3], regions))
    return operations


def _split(operations: list[Operation]) -> list[list[Operation]]:
    regions: list[list[Operation]] = [[]]
    for operation in operations:
        if operation.name == "next":
            regions.append([])
        else:
            regions[-1].append(operation)
    return regions


class _Program:
    """One program's scalars and pointers, and the sums over it."""

    def __init__(self, launch: Launch, arguments: Sequence[str]) -> None:
        names = [parameter.name for parameter in launch.kernel.params]
        values = dict(zip(names, launch.arguments, strict=False)) | launch.options
        self.grid = (*launch.grid, 1, 1)[:3]
        self.scalars: dict[str, Scalar] = {}
        self.roots = {f"%{name}": name for name in arguments}  # the argument that a pointer belongs to
        self.tensors = {name: values[name] for name in arguments if hasattr(values.get(name), "itemsize")}
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.flops = 0
        for name in arguments:
            if isinstance(values.get(name), int):
                self.scalars[f"%{name}"] = int(values[name]), name

    def run(self, operations: list[Operation], times: int) -> list[Loop]:
        """Run the operations `times` times, and return their loops."""
        loops: list[Loop] = []
        for operation in operations:
            handler = getattr(self, operation.name.replace(".", "_"), None)
            if handler is not None:
                loops += handler(operation, times)
            elif operation.name.startswith("arith.") and "tensor<" not in operation.text:
                self.arithmetic(operation)
            elif "load" in operation.name or "store" in operation.name or "atomic" in operation.name:
                self.memory(operation, times)
            elif operation.regions:
                loops += [loop for region in operation.regions for loop in self.run(region, times)]
            self._inherit(operation)
        return loops

    def _inherit(self, operation: Operation) -> None:
        if operation.result and "load" not in operation.name:
            root = next((self.roots[x] for x in _VALUE.findall(operation.text) if x in self.roots), None)
            if root is not None:
                self.roots[operation.result] = root

    def arithmetic(self, operation: Operation) -> None:
        name, text, result = operation.name[6:], operation.text, operation.result
        if result is None:
            return
        if name == "constant":
            if match := re.match(r" (-?\d+|true|false) :|\s(true|false)$", text):
                literal = match[1] or match[2]
                self.scalars[result] = {"true": 1, "false": 0}.get(literal) or int(literal.replace("false", "0")), None
            return
        operands = [self.scalars.get(x) for x in _VALUE.findall(text)]
        if not operands or any(x is None for x in operands):
            return
        (a, base), *rest = [x for x in operands if x is not None]
        if name in ("extsi", "extui", "trunci", "index_cast", "index_castui"):
            self.scalars[result] = a, base
        elif name == "cmpi":
            b, other = rest[0]
            self.scalars[result] = int(_COMPARISONS[text.split(",")[0].strip()](a, b)), None if base == other else result
        elif name == "select":
            self.scalars[result] = rest[0] if a else rest[1]
        elif name in _ARITHMETIC:
            b, other = rest[0]
            base = base if other is None and (base is None or name in ("addi", "subi")) else result
            if name == "addi" and operands[0][1] is None:  # type: ignore[index]
                base = other
            self.scalars[result] = _ARITHMETIC[name](a, b), base

    def memory(self, operation: Operation, times: int) -> None:
        operands = _VALUE.findall(operation.text)
        tile = _TILE.search(operation.text.rpartition(" : ")[2])
        count, kind = (tile[1], tile[2]) if tile else ("", re.findall(r"[a-z]+\d+", operation.text)[-1])
        size = times * max(1, int(re.findall(r"\d+", kind)[0]) // 8)
        for extent in count.split("x")[:-1]:
            size *= int(extent)
        root = self.roots.get(operands[0], "")
        for moved, word in ((self.read, "load"), (self.written, "store")):
            if word in operation.name or "atomic" in operation.name:
                moved[root] = moved.get(root, 0) + size

    def tt_get_program_id(self, operation: Operation, times: int) -> list[Loop]:
        assert operation.result is not None
        self.scalars[operation.result] = (self.grid["xyz".index(operation.text.split()[0])] - 1) // 2, operation.result
        return []

    def tt_get_num_programs(self, operation: Operation, times: int) -> list[Loop]:
        assert operation.result is not None
        self.scalars[operation.result] = self.grid["xyz".index(operation.text.split()[0])], operation.result
        return []

    def tt_dot(self, operation: Operation, times: int) -> list[Loop]:
        left, right = list(_TILE.finditer(operation.text))[:2]
        (rows, contracted), (_, columns) = ([int(n) for n in tile[1].split("x")[:-1]] for tile in (left, right))
        self.flops += 2 * rows * contracted * columns * times
        return []

    def scf_if(self, operation: Operation, times: int) -> list[Loop]:
        """Run the branch that is taken; the first one if that depends on data. The loops of the other have no turns."""
        taken = 0 if self.scalars.get(_VALUE.findall(operation.text)[0], (1, None))[0] else 1
        loops: list[Loop] = []
        for i, region in enumerate(operation.regions):
            loops += self.run(region, times if i == taken else 0)
            if i == taken and operation.result:
                self._assign(operation.result, region[-1])
        return loops if taken < len(operation.regions) else [loop._replace(turns=0) for loop in loops]

    def _assign(self, result: str, source: Operation) -> None:
        """Give the results of an operation the scalars of a yield."""
        for i, value in enumerate(_VALUE.findall(source.text)):
            for name in (f"{result}#{i}", result) if i == 0 else (f"{result}#{i}",):
                self.scalars.pop(name, None)
                if value in self.scalars:
                    self.scalars[name] = self.scalars[value]

    def scf_for(self, operation: Operation, times: int) -> list[Loop]:
        variable, *bounds = _VALUE.findall(operation.text)[:4]
        first, stop, step = (self.scalars.get(x) for x in bounds)
        if first is None or stop is None or step is None:
            raise ValueError(f"the turns of a loop depend on data: scf.for{operation.text}")
        turns = max(0, -(-(stop[0] - first[0]) // step[0]))
        self.scalars[variable] = first[0], variable
        self._carry(operation)
        inner = self.run(operation.regions[0], times * turns)
        return [Loop(turns if times else 0, first[1] == stop[1] and step[1] is None, inner)]

    def _carry(self, operation: Operation) -> list[str]:
        """Give a loop's variables their first values, and return their names."""
        initial = _INITIAL.findall(operation.text)
        for name, value in initial:
            self.roots.pop(name, None)
            if value in self.roots:
                self.roots[name] = self.roots[value]
            if value in self.scalars:
                self.scalars[name] = self.scalars[value]
        return [name for name, _ in initial]

    def scf_while(self, operation: Operation, times: int) -> list[Loop]:
        """Count the turns of a loop `while condition`, then run it. Its variables keep their names in condition and body."""
        names = self._carry(operation)
        (condition, body), first = operation.regions, dict(self.scalars)
        turns, unrollable = 0, True
        while turns <= _MOST_TURNS:
            self.run(condition, 0)
            holds = self.scalars.get(_VALUE.findall(condition[-1].text)[0])
            if holds is None:
                raise ValueError(f"the turns of a loop depend on data: scf.while{operation.text}")
            unrollable = unrollable and holds[1] is None
            if not holds[0] or not times:
                break
            turns += 1
            self.run(body, 0)
            for name, value in zip(names, _VALUE.findall(body[-1].text), strict=False):
                self.scalars.pop(name, None)
                if value in self.scalars:
                    self.scalars[name] = self.scalars[value]
        self.scalars = first
        self.run(condition, 0)
        return [Loop(turns, unrollable, self.run(body, times * turns))]
