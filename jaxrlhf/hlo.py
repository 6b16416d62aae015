"""What a compiled program moves, read off its text: bytes to and from HBM, and bytes that collectives send.

XLA's own `cost_analysis` counts a loop's body once. Here a body counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They only name, count or wait; or are counted where their bodies or starts are.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "copy-done", "async-done", "async-update", "opt-barrier"),
}
# A compiled program on a TPU spreads one collective over several fusions, with these around it.
WRAPPERS = {"custom-call", *COLLECTIVES}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.-]+)")


@dataclass(frozen=True)
class Traffic:
    """Bytes a chip: read from and written to HBM, and sent to other chips by each kind of collective."""

    hbm: float
    sent: dict[str, float]


@dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str  # of the result, with its layout
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    @property
    def root(self) -> _Instruction:
        return list(self.instructions.values())[-1]

    @property
    def starts(self) -> bool:
        """Whether a collective starts here that ends elsewhere."""
        return "AsyncCollectiveStart" in self.root.rest

    def users(self, name: str) -> Iterator[_Instruction]:
        """Who takes this value, bitcasts seen through."""
        for user in self.instructions.values():
            if name in user.operands:
                if user.opcode == "bitcast":
                    yield from self.users(user.name)
                else:
                    yield user

    def source(self, name: str) -> _Instruction:
        """What makes this value, bitcasts seen through."""
        found = self.instructions[name]
        return self.source(found.operands[0]) if found.opcode == "bitcast" else found


def traffic(text: str) -> Traffic:
    """Reads a compiled module's text.

    Raises:
      ValueError: a loop without a bound that can be read.
    """
    computations, entry = _parse(text)
    hbm, sent = 0.0, defaultdict[str, float](float)
    channels = defaultdict[str, list[tuple[float, _Computation, _Instruction]]](list)
    for computation, times in _runs(computations, entry):
        for x in computation.instructions.values():
            hbm += times * _moved(computations, computation, x)
            for holder, collective in _collectives(computations, computation, x):
                channel = re.search(r"channel_id=(\d+)", collective.rest)
                channels[channel[1] if channel else collective.name].append((times, holder, collective))
    for found in channels.values():
        # What starts in one fusion may go on in others, in loops too; it runs as often as it starts.
        begun = [f for f in found if f[1].starts]
        for times, holder, collective in begun or found:
            sent[_kind(collective)] += times * _sent(holder, collective)
            hbm += times * _passed(holder, collective)
    return Traffic(hbm, dict(sent))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(""), ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            current = computations[header[2]] = _Computation(header[2])
            entry = header[2] if header[1] else entry
        elif found := _instruction(line):
            current.instructions[found.name] = found
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    start = re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)
    if not start:
        return None
    end = _closing(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    opcode = line[end:].strip().split("(", 1)[0]
    opened = line.index("(", end)
    closed = _closing(line, opened)
    operands = tuple(re.findall(r"%([\w.-]+)", line[opened:closed])) or (line[opened + 1 : closed - 1],)
    return _Instruction(start[1], line[start.end() : end], opcode, operands, line[closed:])


def _closing(line: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has closed."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {line[:200]}")


def _runs(computations: dict[str, _Computation], name: str, times: float = 1.0) -> Iterator[tuple[_Computation, float]]:
    """The computations that run as such, fusions and reductions apart, and how often each does."""
    computation = computations[name]
    yield computation, times
    for x in computation.instructions.values():
        called = dict.fromkeys(_CALLED.findall(x.rest))
        if x.opcode == "while":
            body = re.search(r"body=%([\w.-]+)", x.rest)
            condition = re.search(r"condition=%([\w.-]+)", x.rest)
            assert body is not None
            assert condition is not None
            if _goes_on(computations, computation, x, condition[1]):
                continue
            yield from _runs(computations, body[1], times * _trips(computations, condition[1], body[1]))
        elif x.opcode == "call":
            for c in called:
                yield from _runs(computations, c, times)
        elif x.opcode == "conditional":
            # Which branch runs is not known: each counts as if it were the one.
            branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
            names = branches[1].split(",") if branches else re.findall(r"(?:true|false)_computation=(%[\w.-]+)", x.rest)
            for c in names:
                yield from _runs(computations, c.strip().lstrip("%"), times)


def _goes_on(computations: dict[str, _Computation], holder: _Computation, x: _Instruction, condition: str) -> bool:
    """Whether a loop counts on where another stopped, which counts as if it had not stopped."""
    start = holder.source(x.operands[0])
    if start.opcode != "tuple":
        return False
    for read in computations[condition].instructions.values():
        if read.opcode == "get-tuple-element" and re.match(r"[su]32\[\]", read.kind):
            index = re.search(r"index=(\d+)", read.rest)
            assert index is not None
            begun = holder.source(start.operands[int(index[1])])
            while begun.opcode == "copy":
                begun = holder.source(begun.operands[0])
            if begun.opcode == "get-tuple-element" and holder.source(begun.operands[0]).opcode == "while":
                return True
    return False


def _trips(computations: dict[str, _Computation], condition: str, body: str) -> int:
    """How often a loop runs: the largest integer that its condition compares with, over what its counter grows by."""
    found, held = [], [condition]
    for name in held:
        for x in computations[name].instructions.values():
            held += [c for c in _CALLED.findall(x.rest) if c not in held]
            if x.opcode == "constant" and re.match(r"[su]32\[\]", x.kind):
                found.append(int(x.operands[0]))
    if not found:
        raise ValueError(f"the loop whose condition is {condition} has no bound that can be read")
    return -(-max(found) // _stride(computations[condition], computations[body]))


def _stride(condition: _Computation, body: _Computation) -> int:
    """What a loop's counter grows by; 1 where that cannot be seen. Products in windows count by twos."""
    counter = [re.search(r"index=(\d+)", condition.instructions[o].rest) for o in condition.root.operands]
    for index in (int(found[1]) for found in counter if found):
        grown = body.source(body.root.operands[index])
        if grown.opcode == "add":
            constants = [body.instructions[o] for o in grown.operands if body.instructions[o].opcode == "constant"]
            return max((int(c.operands[0]) for c in constants), default=1)
    return 1


def _collectives(
    computations: dict[str, _Computation], holder: _Computation, x: _Instruction
) -> Iterator[tuple[_Computation, _Instruction]]:
    """The collectives that an instruction is or holds, each with the computation that it stands in."""
    if x.opcode.removesuffix("-start") in COLLECTIVES:
        yield holder, x
    elif x.opcode in ("fusion", "async-start"):
        for called in re.findall(r"calls=%([\w.-]+)", x.rest):
            for inner in computations[called].instructions.values():
                yield from _collectives(computations, computations[called], inner)


def _kind(x: _Instruction) -> str:
    return x.opcode.removesuffix("-start")


def _sent(holder: _Computation, x: _Instruction) -> float:
    """Bytes that each chip sends, by the rings or halvings that send least (Thakur et al. 2005, table 1)."""
    n, kind = _group(x.rest), _kind(x)
    size = _bytes(x.kind)
    if x.opcode in ("all-gather-start", "collective-permute-start"):  # operands stand in the result too
        size -= sum(_bytes(holder.instructions[o].kind) for o in x.operands if o in holder.instructions)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (n - 1)
    # An all-reduce of which each chip then keeps a slice is a reduce-scatter.
    passes = 2 if kind == "all-reduce" and "all-reduce-scatter" not in holder.name else 1
    return passes * size * (n - 1) / n


def _passed(holder: _Computation, x: _Instruction) -> float:
    """Bytes of HBM that a collective reads and writes."""
    read = sum(_bytes(holder.instructions[o].kind, hbm=True) for o in x.operands if o in holder.instructions)
    if "all-reduce-scatter" in holder.name:  # which writes but a slice, its fusion's result
        return read
    return read + _bytes(x.kind, hbm=True) - (read if x.opcode.endswith("-start") else 0.0)


def _group(rest: str) -> int:
    """How many chips take part in each group of a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(listed[1])
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return written[1].count(",") + 1
    return 2  # pairs of collective-permute, whose size does not depend on it


def _bytes(kind: str, hbm: bool = False) -> float:
    """The bytes of all arrays of a type; with `hbm`, of those that lie there and not in a memory on the chip."""
    total = 0.0
    for name, dims, layout in _ARRAY.findall(kind):
        if not (hbm and "S(" in layout):
            bits = 8 if name == "pred" else int((re.search(r"\d+", name) or ["0"])[0])
            total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    return total


def _moved(computations: dict[str, _Computation], holder: _Computation, x: _Instruction) -> float:
    """Bytes that one instruction reads from HBM and writes to it."""
    if x.opcode in FREE or x.opcode.endswith("-done") or _kind(x) in COLLECTIVES:
        return 0.0
    if x.opcode in ("copy-start", "slice-start"):  # its result names both ends
        return _bytes(x.kind, hbm=True)
    operands = [holder.instructions[o] for o in x.operands if o in holder.instructions]
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return _bytes(x.kind, hbm=True) + (_bytes(x.kind) if _bytes(operands[0].kind, hbm=True) else 0.0)
    if x.opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].kind) if _bytes(x.kind, hbm=True) else 0.0
    called = re.search(r"calls=%([\w.-]+)", x.rest)
    if x.opcode != "fusion" or not called:
        return _bytes(x.kind, hbm=True) + sum(_bytes(o.kind, hbm=True) for o in operands)
    return _fused(computations[called[1]], x, operands)


def _fused(inner: _Computation, x: _Instruction, operands: list[_Instruction]) -> float:
    """The same of a fusion, of whose operands and results it may touch but slices."""
    moved = 0.0
    parameters = {int(p.operands[0]): p for p in inner.instructions.values() if p.opcode == "parameter"}
    for i, operand in enumerate(operands):
        whole = _bytes(operand.kind, hbm=True)
        users = [u for u in inner.users(parameters[i].name) if u.opcode not in WRAPPERS | {"tuple"}]
        sliced = sum(_bytes(u.kind) for u in users if u.opcode in ("dynamic-slice", "slice", "gather"))
        rest = [u for u in users if u.opcode not in ("dynamic-slice", "slice", "gather") and not _target(inner, u, i)]
        moved += whole if rest else min(whole, sliced)
    root = inner.source(inner.root.name)
    outputs = [inner.source(o) for o in root.operands] if root.opcode == "tuple" else [root]
    kinds = _elements(x.kind) if root.opcode == "tuple" else [x.kind]
    for output, kind in zip(outputs, kinds, strict=True):
        written = _bytes(kind, hbm=True)
        if output.opcode == "dynamic-update-slice":
            moved += min(written, _bytes(inner.instructions[output.operands[1]].kind))
        elif output.opcode not in WRAPPERS | {"parameter"}:
            moved += written
    return moved


def _target(inner: _Computation, user: _Instruction, index: int) -> bool:
    """Whether a parameter is but what a dynamic-update-slice writes into."""
    if user.opcode != "dynamic-update-slice":
        return False
    source = inner.source(user.operands[0])
    return source.opcode == "parameter" and source.operands[0] == str(index)


def _elements(kind: str) -> list[str]:
    """The types of a tuple's elements, tuples in it kept whole."""
    found, depth, start = [], 0, 1
    for i in range(1, len(kind) - 1):
        depth += (kind[i] in "({[") - (kind[i] in ")}]")
        if kind[i] == "," and not depth:
            found.append(kind[start:i])
            start = i + 1
    return [*found, kind[start:-1]]
