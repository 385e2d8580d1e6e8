"""Pairing of states: finds the output that is the next value of an input, by names and by the graph.

A pair is accepted if there is only one interpretation. If there are several the user is asked: a file
with wrongly paired states runs without an error and is wrong from the second frame on. So does a file with a state
that is taken for data, so what may be a state is asked about too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stepcell.contract import STATE_IN, STATE_OUT
from stepcell.errors import UsageError
from stepcell.exporter.from_onnx.evidence import Evidence, Link
from stepcell.exporter.from_onnx.onnx_file import Port
from stepcell.exporter.from_onnx.state_name_words import Mark, core_of, numbered, read, says_data, says_state

__all__ = ["Pair", "Pairing", "find_pairs"]


@dataclass(frozen=True)
class Pair:
    """One state: its input, the output that is its next value, and its name."""

    input: str
    output: str
    name: str


@dataclass(frozen=True)
class Pairing:
    """The states of a file, in the order of its inputs; `notes`: possible states that were not taken."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Match:
    input: str
    output: str
    words: tuple[str, ...]
    mark: Mark


@dataclass
class _Search:
    """Progress of the search: unpaired inputs and outputs, pairs, questions and notes for the user."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]
    taken: dict[str, str] = field(default_factory=dict)
    cores: dict[str, str] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, source: str, target: str, core: str) -> None:
        self.taken[source] = target
        self.cores[source] = core
        del self.inputs[source], self.outputs[target]

    def ask(self, source: str, targets: Iterable[str], why: str) -> None:
        targets = sorted(targets)
        self.questions.append(f"{source}: {why}: {', '.join(targets)}")
        self.arguments.append(
            " or ".join([*(f"--state {source}={target}" for target in targets), f"--state {source}="])
        )
        self.inputs.pop(source, None)


def find_pairs(
    inputs: Sequence[Port], outputs: Sequence[Port], evidence: Evidence, given: Mapping[str, str]
) -> Pairing:
    """Find the states of a file.

    Args:
        evidence: what the graph says.
        given: pairs that the user gave; an empty output: the input is not a state.

    Raises:
        UsageError: `given` does not fit the file, or a pair is ambiguous; the hint then has the
            arguments to choose from.
    """
    search = _Search({port.name: port for port in inputs}, {port.name: port for port in outputs})
    _take_exported(search, given)
    _take_given(search, given)
    _note_contradictions(search, evidence, given)
    links = {
        source: {t: link for t, link in evidence.outputs_of(source).items() if _fit(search, source, t)}
        for source in search.inputs
    }
    links = {source: targets for source, targets in links.items() if targets}
    _take_by_name(search, links)
    _take_by_graph(search, links)
    _ask_about_both_ways(search, evidence, given)
    _ask_for_rest(search, evidence, inputs[0].name if inputs else "")
    if search.questions:
        raise UsageError(
            f"which output is the next value of which input is not clear: {'; '.join(search.questions)}",
            hint=f"give it: {'; '.join(search.arguments)} (an empty right side: not a state; --stateless: none is)",
        )
    cores = {port.name: search.cores[port.name] for port in inputs if port.name in search.taken}
    ends = {*search.taken, *search.taken.values()}
    names = _state_names(cores, {port.name for port in (*inputs, *outputs)} - ends)
    return Pairing(
        tuple(Pair(source, search.taken[source], name) for source, name in names.items()), tuple(search.notes)
    )


def _take_exported(search: _Search, given: Mapping[str, str]) -> None:
    """Pair inputs and outputs that are named as stepcell names them, `state_in.h` and `state_out.h`."""
    for source in [name for name in search.inputs if name.startswith(STATE_IN) and name not in given]:
        name = source.removeprefix(STATE_IN)
        after = search.outputs.get(STATE_OUT + name)
        if after is not None and after.name not in given.values() and search.inputs[source].fits(after):
            search.take(source, after.name, name)


def _fit(search: _Search, source: str, target: str) -> bool:
    return target in search.outputs and search.inputs[source].becomes(search.outputs[target])


def _take_given(search: _Search, given: Mapping[str, str]) -> None:
    for source, target in given.items():
        if source not in search.inputs:
            raise UsageError(f"--state {source}={target}: no such input", hint=f"inputs: {_list(search.inputs)}")
        if not target:
            continue
        if target not in search.outputs:
            what = "given twice" if target in search.taken.values() else "no such output"
            raise UsageError(f"--state {source}={target}: {what}", hint=f"outputs: {_list(search.outputs)}")
        before, after = search.inputs[source], search.outputs[target]
        if not before.becomes(after):
            raise UsageError(
                f"--state {source}={target}: input and output of a state have one dtype and shape, "
                f"got {before.dtype} {before.shape} and {after.dtype} {after.shape}"
            )
        common = [match.words for match in _matches([before], [after])]
        search.take(source, target, core_of(source, common[0]) if common else source)
    for source, target in given.items():
        if not target:
            del search.inputs[source]


def _note_contradictions(search: _Search, evidence: Evidence, given: Mapping[str, str]) -> None:
    """Say where the user pairs an input with another output than the one that the graph computes from it."""
    for source, target in given.items():
        sure = {name: link for name, link in evidence.outputs_of(source).items() if link.is_sure}
        if target and sure and target not in sure:
            proved, link = next(iter(sure.items()))
            search.notes.append(
                f"{source}: {target} is fed back, as --state says, and the graph says another: {link.by} starts from "
                f"{source} and leaves {proved}; if that is meant: --state {source}={proved}"
            )


def _ask_about_both_ways(search: _Search, evidence: Evidence, given: Mapping[str, str]) -> None:
    """A node that also reads its sequence backwards leaves the state of the first frame, which is no past of the next.

    A user who gives the pair all the same is told.
    """
    for source, target in list(search.taken.items()):
        link = evidence.outputs_of(source).get(target)
        if link is None or link.by not in evidence.both_ways:
            continue
        why = (
            f"{link.by} reads its sequence in both directions, and the backward one, which starts at the last frame, "
            "leaves no past for the next call"
        )
        if given.get(source) == target:
            search.notes.append(f"{source}: {why}; {target} is fed back, as --state says")
            continue
        search.questions.append(f"{source}: {why} (train it with bidirectional=False)")
        search.arguments.append(
            f"--state {source}= (data of every call) or --state {source}={target} (fed back anyway)"
        )


def _take_by_name(search: _Search, links: Mapping[str, Mapping[str, Link]]) -> None:
    matches = []
    for match in _matches(search.inputs.values(), search.outputs.values()):
        by_cell = match.output in links.get(match.input, ())
        plain = says_data(match.input) or (match.mark < Mark.TIME and not says_state(match.input))
        if plain and not by_cell:
            search.notes.append(
                f"{match.input} and {match.output} are named like a state before and after the step, but they may be "
                f"data as well; if {match.output} is fed back: --state {match.input}={match.output}"
            )
        else:
            matches.append(match)
    best = {
        side: {
            name: max(m.mark for m in matches if getattr(m, side) == name)
            for name in {getattr(m, side) for m in matches}
        }
        for side in ("input", "output")
    }
    matches = [m for m in matches if m.mark == best["input"][m.input] and m.mark == best["output"][m.output]]
    for source in dict.fromkeys(match.input for match in matches):
        own = {match.output: match for match in matches if match.input == source}
        rivals = {match.input for match in matches if match.output in own} - {source}
        if len(own) > 1 or rivals:
            why = "its name fits several outputs" if len(own) > 1 else f"so does the name of {_list(rivals)}, fits"
            search.ask(source, own, why)
            continue
        (match,) = own.values()
        wired = links.get(source, {})
        claimed = {other.output for other in matches if other.input != source}
        contradicted = any(link.is_sure for link in wired.values()) or claimed.intersection(wired)
        if wired and match.output not in wired and contradicted:
            by = next(iter(wired.values())).by
            search.ask(source, {match.output, *wired}, f"its name and {by}, which reads it, imply different outputs")
        elif source in search.inputs and match.output in search.outputs:
            search.take(source, match.output, core_of(source, match.words))


def _take_by_graph(search: _Search, links: Mapping[str, Mapping[str, Link]]) -> None:
    """Pair the rest as the graph has it, where its nodes or the input's name leave no other reading."""
    open_links = {
        source: {target: link for target, link in targets.items() if target in search.outputs}
        for source, targets in links.items()
        if source in search.inputs
    }
    open_links = {source: targets for source, targets in open_links.items() if targets}
    sure = {source for source, targets in open_links.items() if all(link.is_sure for link in targets.values())}
    alike = _count_alike({source: list(targets) for source, targets in open_links.items()})
    for source, targets in open_links.items():
        by = next(iter(targets.values())).by
        rivals = [other for other in open_links if other != source and set(open_links[other]) & set(targets)]
        named = says_state(source, clearly=True) or alike
        if says_data(source) and source not in sure and not named:
            search.notes.append(
                f"{source} and {' or '.join(targets)} look like a hidden state before and after {by}, but {source} is "
                f"named like data; if {next(iter(targets))} is fed back: --state {source}={next(iter(targets))}"
            )
        elif len(targets) > 1 or rivals:
            search.ask(
                source, targets, f"{by} reads it as its old state, and its new one may be one of several outputs"
            )
        elif named:
            search.take(source, next(iter(targets)), source)
        elif source in sure and not says_data(source):
            search.take(source, next(iter(targets)), source)
            search.notes.append(
                f"{source} is a state, and {next(iter(targets))} its next value: {by} computes one from the other; if "
                f"not: --state {source}="
            )
        else:
            search.ask(source, targets, f"{by} may read it as its old state, and compute its next value")


def _count_alike(pairs: Mapping[str, Sequence[str]]) -> bool:
    """Whether s0 becomes t0, s1 becomes t1, ...: two or more pairs with one stem per side and equal numbers."""
    stems = set()
    for source, targets in pairs.items():
        before, after = numbered(source), numbered(targets[0])
        if len(targets) != 1 or before is None or after is None or before[1] != after[1]:
            return False
        stems.add((before[0], after[0]))
    return len(pairs) > 1 and len(stems) == 1


def _ask_for_rest(search: _Search, evidence: Evidence, first: str) -> None:
    """Ask about inputs that may be a state, rather than make them data inputs.

    Args:
        first: the first input of the file, which is data unless its name says otherwise.
    """
    for source in list(search.inputs):
        before = search.inputs[source]
        fitting = [t for t, port in search.outputs.items() if port.fits(before) and port.shape != ()]
        if says_data(source) or not fitting:
            continue
        if says_state(source, clearly=True):
            search.ask(source, fitting, "its name denotes a state, and its next value may be one of these outputs")
            continue
        computed = [
            t
            for t in fitting
            if (source in evidence.reads.get(t, ()) or evidence.copies.get(t, source) != source) and not says_data(t)
        ]
        if source != first and computed and before.dtype.startswith("float") and before.has_elements:
            search.ask(source, computed, "it may be a state: its dtype and shape are those of")


def _matches(inputs: Iterable[Port], outputs: Iterable[Port]) -> list[_Match]:
    """Every input and output whose names have the same remaining words, with the strongest parse of both."""
    read_outputs = [(port, {r.words: r.mark for r in read(port.name, "out")}) for port in outputs]
    found = []
    for before in inputs:
        readings = read(before.name, "in")
        for after, by_words in read_outputs:
            both = [
                _Match(
                    before.name, after.name, r.words, max(filter(None, (r.mark, by_words[r.words])), default=Mark.SIDE)
                )
                for r in readings
                if r.words in by_words and before.becomes(after)
            ]
            if both:
                found.append(max(both, key=lambda match: (match.mark, len(match.words))))
    return found


def _state_names(cores: Mapping[str, str], data: set[str]) -> dict[str, str]:
    """A name for each state: the words that both names share, or the input's own name where that is not unique."""
    names = {}
    for source, core in cores.items():
        unique = list(cores.values()).count(core) == 1 and core not in data and core[:1].isalpha()
        exported = source.startswith(STATE_IN) and core == source.removeprefix(STATE_IN)
        names[source] = core if unique and exported else core_of(source, [core if unique else source])
    return names


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
