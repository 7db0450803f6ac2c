"""What a dispatcher has been told: kept exactly, changed exactly, and its numbers never given again too soon."""

from __future__ import annotations

import socket
import time
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fastrecv import state as module
from fastrecv.errors import StateError
from fastrecv.rules import Binding, Destination, RuleSetError, destinations_of
from fastrecv.state import MAX_BINDINGS, MAX_DESTINATIONS, State, check_label, key_of

FOUR = ip_network("192.0.2.0/24")
LABELS = st.sampled_from(["a", "b", "c", "d", None])
NETWORKS = {
    4: st.builds(lambda number, length: IPv4Network((number, length), strict=False), st.integers(0, 3), st.just(32))
    | st.just(FOUR),
    6: st.builds(lambda number, length: IPv6Network((number, length), strict=False), st.integers(0, 3), st.just(128))
    | st.just(ip_network("2001:db8::/32")),
}  # few, so that bindings often have the same key
BINDINGS = st.sampled_from([4, 6]).flatmap(
    lambda version: st.builds(
        Binding,
        protocol=st.sampled_from(["tcp", "udp", "any"]),
        prefix=NETWORKS[version],
        ports=st.sampled_from([(80, 80), (0, 65535), (1, 9)]),
        label=LABELS,
        source=st.none() | NETWORKS[version],
        interface=st.sampled_from([0, 3]),
        on_miss=st.sampled_from(["drop", "pass"]),
    )
)
RULE_SETS = st.lists(BINDINGS, max_size=8, unique_by=key_of)


def bound(label: str | None, protocol: Literal["tcp", "udp", "any"] = "tcp", number: int = 0) -> Binding:
    return Binding(protocol, IPv4Network((number, 32)), (80, 80), label)


def destination(label: str | None, protocol: int = socket.IPPROTO_TCP) -> Destination:
    return Destination(label, socket.AF_INET, protocol)


class Clock:
    """Stands for CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self, which: int) -> float:
        assert which == time.CLOCK_BOOTTIME
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "clock_gettime", made.read)
    return made


@given(RULE_SETS, st.dictionaries(st.integers(0, 99), st.floats(0, 1e9)))
def test_what_is_written_is_what_is_read(bindings: list[Binding], retired: dict[int, float]) -> None:
    state = State.empty()
    state.replace(bindings)
    state.number(bindings, set())
    state.version, state.program, state.tag, state.retired = "1.2.3", "digest", "tag", retired
    found = State.decode(state.encode())
    assert found == state
    assert found.bindings == bindings
    assert list(found.numbers) == destinations_of(bindings)


@given(RULE_SETS, RULE_SETS)
def test_a_change_is_told_exactly(before: list[Binding], after: list[Binding]) -> None:
    state = State.empty()
    assert state.replace(before) == (before, [])
    change = state.replace(after)
    assert state.bindings == after
    assert change.added == [binding for binding in after if binding not in before]
    assert change.removed == [binding for binding in before if binding not in after]
    assert state.replace(after) == ([], [])


def test_a_binding_whose_label_or_on_miss_changes_is_removed_and_added() -> None:
    old, new = Binding("tcp", FOUR, (80, 80), "a"), Binding("tcp", FOUR, (80, 80), "b", on_miss="pass")
    state = State.empty()
    state.replace([old])
    assert state.replace([new]) == ([new], [old])
    assert key_of(old) == key_of(new)


@pytest.mark.parametrize(
    "other",
    [
        Binding("udp", FOUR, (80, 80), "a"),
        Binding("tcp", ip_network("192.0.2.0/25"), (80, 80), "a"),
        Binding("tcp", ip_network("c000:200::/24"), (80, 80), "a"),  # the same first bytes
        Binding("tcp", FOUR, (80, 81), "a"),
        Binding("tcp", FOUR, (80, 80), "a", interface=1),
    ],
)
def test_bindings_that_differ_in_anything_else_are_two(other: Binding) -> None:
    assert key_of(other) != key_of(Binding("tcp", FOUR, (80, 80), "a"))


@given(RULE_SETS)
def test_bindings_are_counted_by_where_they_lead(bindings: list[Binding]) -> None:
    state = State.empty()
    state.replace(bindings)
    counted = state.bound()
    assert set(counted) == set(destinations_of(bindings))
    for name, count in counted.items():
        assert count == sum(name in destinations_of([binding]) for binding in bindings)


class Numbering(RuleBasedStateMachine):
    """Rule sets come and go, sockets are registered and closed, time passes; numbers are used as told."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.clock = State.empty(), Clock()
        self.left: dict[int, float] = {}  # when a number was last in use
        self.registered: set[int] = set()

    def changed(self, before: dict[Destination, int], new: dict[Destination, int]) -> None:
        after = self.state.numbers
        assert len(set(after.values())) == len(after), "a number is that of two"
        assert new == {name: number for name, number in after.items() if before.get(name) != number}
        assert not new.keys() & before.keys(), "what was numbered keeps its number"
        for number in new.values():
            assert self.clock.now - self.left.get(number, -60.0) >= 60, f"{number} was given again too soon"
        for name, number in before.items():
            if name not in after:
                self.left[number] = self.clock.now

    @rule(bindings=RULE_SETS)
    def replace(self, bindings: list[Binding]) -> None:
        before = self.state.numbers
        self.state.replace(bindings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "clock_gettime", self.clock.read)
            self.changed(before, self.state.number(bindings, self.registered))
        kept = {name for name, number in before.items() if number in self.registered}
        assert set(self.state.numbers) == set(destinations_of(bindings)) | kept

    @rule(label=st.sampled_from("abcd"), protocol=st.sampled_from([socket.IPPROTO_TCP, socket.IPPROTO_UDP]))
    def register(self, label: str, protocol: int) -> None:
        before, name = self.state.numbers, destination(label, protocol)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "clock_gettime", self.clock.read)
            self.changed(before, self.state.add([name]))
        assert set(self.state.numbers) == set(before) | {name}
        self.registered.add(self.state.numbers[name])

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if self.registered:
            self.registered.remove(data.draw(st.sampled_from(sorted(self.registered))))

    @rule(seconds=st.sampled_from([0.1, 30.0, 59.9, 60.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def it_can_be_written(self) -> None:
        assert State.decode(self.state.encode()) == self.state


def test_numbers_stay_with_their_destinations_and_rest_before_they_are_given_again() -> None:
    run_state_machine_as_test(Numbering, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))


def test_a_number_rests_for_a_minute(clock: Clock) -> None:
    state = State.empty()
    assert state.number([bound("a")], set()) == {destination("a"): 0}
    assert state.number([bound("b")], set()) == {destination("b"): 1}
    clock.now += 59.9
    assert state.number([bound("b"), bound("c")], set()) == {destination("c"): 2}
    clock.now += 0.1
    assert state.number([bound("b"), bound("c"), bound("d")], set()) == {destination("d"): 0}
    assert state.retired == {}


def test_what_has_sockets_keeps_its_number_without_a_binding() -> None:
    state = State.empty()
    state.number([bound("a"), bound("b")], set())
    assert state.number([], {1}) == {}
    assert state.numbers == {destination("b"): 1}
    assert state.number([bound("b")], {1}) == {}


def test_too_many_bindings_are_refused_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BINDINGS", 2)
    state = State.empty()
    state.replace([bound("a", number=number) for number in range(2)])
    before = state.encode()
    with pytest.raises(RuleSetError, match="3 bindings, 2 at most: bind shorter prefixes"):
        state.replace([bound("b", number=number) for number in range(3)])
    assert state.encode() == before
    assert MAX_BINDINGS == 1_000_000


def test_as_many_destinations_as_there_are_places_and_not_one_more() -> None:
    state = State.empty()
    bindings = [bound(f"label-{number}") for number in range(MAX_DESTINATIONS)]
    assert sorted(state.number(bindings, set()).values()) == list(range(MAX_DESTINATIONS))
    before = state.encode()
    with pytest.raises(RuleSetError, match=r"4,097 destinations \(a label counts once for each family and protocol\)"):
        state.number([*bindings, bound("one more")], set())
    with pytest.raises(RuleSetError, match="and 0 whose numbers rest for a minute, 4,096 at most: use fewer labels"):
        state.add([destination("one more")])
    assert state.numbers == State.decode(before).numbers
    assert state.add([destination("label-7")]) == {}, "what has a number needs no other"


def test_numbers_that_rest_are_not_free(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DESTINATIONS", 2)
    state = State.empty()
    state.number([bound("a", "any")], set())
    assert state.number([], set()) == {}
    with pytest.raises(RuleSetError, match="and 2 whose numbers rest for a minute, 2 at most"):
        state.number([bound("b")], set())
    clock.now += 60
    assert state.number([bound("b")], set()) == {destination("b"): 0}


def test_a_document_of_another_format_is_refused_with_what_to_do() -> None:
    foreign = msgspec.msgpack.encode({"format": 2, "version": "9.9", "novelty": [1]})
    with pytest.raises(StateError) as caught:
        State.decode(foreign)
    assert str(caught.value) == (
        "this dispatcher was loaded by fastrecv 9.9 (state format 2, here 1): use that version, or "
        "`fastrecv lookup unload`, then load and bind anew"
    )


@pytest.mark.parametrize("label", ["a", "web.example:443", "ä" * 127, "x" * 255, "--web"])
def test_a_label_is_any_printable_word(label: str) -> None:
    check_label(label)


@pytest.mark.parametrize(
    "label", ["", None, "two words", "tab\t", "line\n", "x" * 256, "ä" * 128, "\N{NO-BREAK SPACE}"]
)
def test_what_is_no_label_is_refused(label: str | None) -> None:
    with pytest.raises(RuleSetError) as caught:
        check_label(label)
    said = str(caught.value)
    assert said.endswith(": give 1 to 255 bytes, printable and without spaces")
    assert said.startswith(f"label {label!r}" if label is None or len(label) < 40 else f"label {label[:40]!r}...: ")


@pytest.mark.parametrize("label", ["drop", "Drop", "DROP"])
def test_the_verdict_is_no_label(label: str) -> None:
    with pytest.raises(RuleSetError, match="'drop' is a verdict, not a label: choose another name"):
        check_label(label)


@pytest.mark.parametrize("label", ["a", "b", None])
def test_a_rule_set_with_a_binding_twice_is_refused_and_nothing_is_changed(label: str | None) -> None:
    state = State.empty()
    state.replace([bound("kept")])
    with pytest.raises(RuleSetError, match=rf"tcp 0\.0\.0\.0/32 port 80 is bound twice, to a and to {label or 'drop'}"):
        state.replace([bound("a"), bound("a", number=1), bound(label)])
    assert [binding.label for binding in state.bindings] == ["kept"]


def test_a_rule_set_with_a_wrong_label_is_refused_and_nothing_is_changed() -> None:
    state = State.empty()
    state.replace([bound("a"), bound(None, number=1)])
    with pytest.raises(RuleSetError, match="label 'two words'"):
        state.replace([bound("two words")])
    assert [binding.label for binding in state.bindings] == ["a", None]
