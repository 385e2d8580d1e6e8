"""What the graph itself says about states: inputs that a recurrent node or cell turns into outputs.

The standard's LSTM, GRU and RNN take their old state as an input of the node and return the new one (`initial_h`
and `Y_h`); Loop and Scan carry values from one iteration to the next. Cells of ordinary nodes are recognised by
their equations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import NearMiss, RecognisedCell
from stepcell.exporter.cell_recognition.graph_walk import ancestors, is_made_inside
from stepcell.exporter.cell_recognition.state_pairs import RESHAPING, Carriers

__all__ = ["Evidence", "Link", "find_evidence"]

_NATIVE = {"LSTM": 2, "GRU": 1, "RNN": 1}  # states of the node: h, c
_NAMED = 4  # nodes in a warning
_FIRST_STATE = 5  # index of initial_h among the node's inputs


@dataclass(frozen=True)
class Link:
    """An input that a node or cell of the graph takes as its old state, and an output that is its new state.

    Attributes:
        by: the node or cell, for messages.
        is_sure: the equations allow no other reading; False: the cell may as well merge two inputs of one step, or
            another input may be its h.
    """

    input: str
    output: str
    by: str
    is_sure: bool = True


@dataclass(frozen=True)
class Evidence:
    """What the graph says about its states.

    Attributes:
        links: in the order of the graph.
        reads: by output, the inputs that its value depends on.
        copies: outputs that are an input as it came in, with that input: the last frame, for the next step.
        forgetful: names of the recurrent nodes and cells that start from zeros at every call.
        both_ways: the recurrent nodes that read their sequence in both directions.
        unreturned: inputs that a recurrent node starts from while no output is its last state, with the node.
    """

    links: tuple[Link, ...] = ()
    reads: Mapping[str, frozenset[str]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    forgetful: tuple[str, ...] = ()
    both_ways: tuple[str, ...] = ()
    unreturned: Mapping[str, str] = field(default_factory=dict)

    def outputs_of(self, source: str) -> dict[str, Link]:
        """The links of an input, by output."""
        return {link.output: link for link in self.links if link.input == source}

    def warnings(self, states: Collection[str]) -> list[str]:
        """What a file does not remember from step to step, in words.

        Args:
            states: the inputs that are states.
        """
        found = [
            f"{name}: {by} starts from it, and its new value is no output of the file: it is data, given at every step"
            for name, by in self.unreturned.items()
            if name not in states
        ]
        if self.forgetful:
            found.append(_forgetful_text(self.forgetful, self.both_ways, alone=not states))
        elif not states and not found:
            found.append(
                "no input is a state: every step is computed from its inputs alone. If this is meant: --stateless"
            )
        return found


def _forgetful_text(names: Sequence[str], both_ways: Collection[str], *, alone: bool) -> str:
    several = len(names) > 1
    subject = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    text = f"{subject}: {'start' if several else 'starts'} from zeros at every call"
    if not alone:
        return f"{text}: right along an axis of one frame, such as frequency; along time, nothing reaches the next step"
    read = ", and reads it in both directions" if set(names) & set(both_ways) else ""
    states = "these states as inputs and outputs" if several else "this state as input and output"
    return (
        f"{text}, so that nothing reaches the next call: this is a model of whole clips{read}. To step it frame by "
        f"frame, export it with {states}; if whole clips are meant: --stateless"
    )


@dataclass(frozen=True)
class _Transition:
    """One state of a node or cell: its value before the step, and after it; a second value after it is the sequence."""

    by: str
    before: ir.Value
    afters: tuple[ir.Value | None, ...]
    is_sure: bool = True


def find_evidence(model: ir.Model, cells: Sequence[RecognisedCell], misses: Sequence[NearMiss]) -> Evidence:
    """Read the graph.

    Args:
        model: without functions.
        cells: recognised in it.
        misses: parts of it that have the form of a cell.
    """
    graph = model.graph
    nodes = [node for node in ir.traversal.RecursiveGraphIterator(graph) if not node.domain]
    transitions = [*_of_nodes(nodes), *_of_cells(graph, cells, misses)]
    befores = {after: each.before for each in transitions for after in each.afters if after}
    strict, loose = Carriers(graph, befores, RESHAPING), Carriers(graph, befores)
    links: dict[tuple[str, str], Link] = {}
    unreturned: dict[str, str] = {}
    for each in transitions:
        sources = strict.inputs_of(each.before) or loose.inputs_of(each.before)
        found = [strict.outputs_of(after) or loose.outputs_of(after) if after else [] for after in each.afters]
        place, targets = next(((place, each) for place, each in enumerate(found) if each), (0, []))
        for source in sources:
            if not found[0]:
                unreturned[str(source.name)] = each.by
            for target in targets:
                link = Link(str(source.name), str(target.name), each.by, each.is_sure and place == 0)
                if link.is_sure or (link.input, link.output) not in links:
                    links[link.input, link.output] = link
    zero = list(_forgetful(nodes)) + [_cell_text(miss.name) for miss in misses if is_made_inside(miss.states[0][0])]
    return Evidence(
        links=tuple(links.values()),
        reads={str(v.name): frozenset(str(a.name) for a in ancestors(v) if a in graph.inputs) for v in graph.outputs},
        copies={str(v.name): str(source.name) for v in graph.outputs if (source := _copied(v)).is_graph_input()},
        forgetful=tuple(zero),
        both_ways=tuple(_node_text(node) for node in nodes if _reads_both_ways(node)),
        unreturned=unreturned,
    )


def _of_nodes(nodes: Sequence[ir.Node]) -> Iterator[_Transition]:
    for node in nodes:
        by = _node_text(node)
        for index in range(_NATIVE.get(node.op_type, 0)):
            before = _input(node, _FIRST_STATE + index)
            afters = [_output(node, 1 + index)]
            if index == 0:
                afters.append(_output(node, 0))  # the sequence of h, where it has one step
            if before is not None:
                yield _Transition(by, before, tuple(afters))
        carried = node.inputs[2:] if node.op_type == "Loop" else node.inputs[: _carried_by_scan(node)]
        for before, after in zip(carried, node.outputs, strict=False):
            if before is not None and not is_made_inside(before):
                yield _Transition(by, before, (after,))


def _of_cells(graph: ir.Graph, cells: Sequence[RecognisedCell], misses: Sequence[NearMiss]) -> Iterator[_Transition]:
    for name, op, states, new in (
        *((cell.name, cell.op, cell.states, cell.states[0][1]) for cell in cells),
        *((miss.name, miss.kind, miss.states, miss.after) for miss in misses),
    ):
        merges = len(graph.outputs) == 1 and not any(True for _ in new.uses())
        for before, after in states:
            guessed = op == "ConvLSTM" and after is new  # any input of the gates may be called h
            yield _Transition(_cell_text(name), before, (after,), is_sure=not (merges or guessed))


def _forgetful(nodes: Sequence[ir.Node]) -> Iterator[str]:
    """The recurrent nodes without an initial state, or with one that no input determines."""
    for node in nodes:
        count = _NATIVE.get(node.op_type, 0)
        starts = [_input(node, _FIRST_STATE + index) for index in range(count)]
        if count and any(start is None or is_made_inside(start) for start in starts):
            yield _node_text(node)


def _reads_both_ways(node: ir.Node) -> bool:
    direction = node.attributes.get("direction")
    return node.op_type in _NATIVE and direction is not None and direction.as_string() == "bidirectional"


def _carried_by_scan(node: ir.Node) -> int:
    return len(node.inputs) - node.attributes["num_scan_inputs"].as_int() if node.op_type == "Scan" else 0


def _copied(value: ir.Value) -> ir.Value:
    """The value that this one is a copy of, or itself."""
    while (node := value.producer()) is not None and node.op_type == "Identity" and (source := node.inputs[0]):
        value = source
    return value


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _output(node: ir.Node, index: int) -> ir.Value | None:
    return node.outputs[index] if index < len(node.outputs) and node.outputs[index].name else None


def _node_text(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or next((str(v.name) for v in node.outputs if v.name), '')}"


def _cell_text(name: str) -> str:
    return f"cell {name}"
