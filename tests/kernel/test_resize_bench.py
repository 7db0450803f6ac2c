"""Resizing under a flood: nothing lost, nothing misdirected, few moved; and that the account would show it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from fastrecv.balance import Balancer
from fastrecv.bench import resize
from fastrecv.bench.resize import Account


def run() -> Account:
    return resize.measure("buckets", 1000, 0.3, lambda _text: None)


def test_every_datagram_is_accounted_for_and_as_few_senders_move_as_can() -> None:
    result = CliRunner().invoke(resize.command, ["--seconds", "0.5", "--json"])
    assert result.exit_code == 0
    accounts = json.loads(result.stdout)["accounts"]
    assert [account["method"] for account in accounts] == ["buckets", "modulo"]
    for account in accounts:
        assert account["sent"] == account["received"] > 10_000
        assert [account[name] for name in ("repeated", "misdirected", "full", "refused", "destroyed")] == [0] * 5
        assert [(step["before"], step["after"]) for step in account["steps"]] == [(4, 5), (5, 3)]
    buckets, modulo = accounts
    assert all(step["moved"] <= 1.1 * step["ideal"] for step in buckets["steps"])
    assert all(step["moved"] > 1.5 * step["ideal"] for step in modulo["steps"])


def test_a_member_that_is_closed_unread_shows_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(member: resize.Member) -> None:
        """Stop reading, let the queue fill, and close."""
        member._ending.set()
        member._thread.join()
        if member.slot == 4:
            assert member.sock.recv(99)
        member.sock.close()

    def read(member: resize.Member, original: Callable[[resize.Member], None] = resize.Member._read) -> None:
        if member.slot == 4:
            member._ending.wait()
            return
        original(member)

    monkeypatch.setattr(resize.Member, "_read", read)
    monkeypatch.setattr(resize.Member, "end", end)
    account = run()
    assert account.destroyed > 0
    assert account.misdirected == 0
    assert not account.sound


def test_senders_that_come_to_a_wrong_member_show_as_misdirected(monkeypatch: pytest.MonkeyPatch) -> None:
    register = Balancer.register

    def swapped(balancer: Balancer, slot: int, sock: socket.socket) -> None:
        register(balancer, slot ^ 1 if slot < 4 else slot, sock)

    monkeypatch.setattr(Balancer, "register", swapped)
    account = run()
    assert account.misdirected > account.received / 2
    assert not account.sound


def test_senders_that_are_refused_meanwhile_show_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Balancer.resize

    def early(balancer: Balancer, size: int) -> int:
        if size == 3:
            balancer.unregister(4)  # while it still has senders
            time.sleep(0.1)
        return original(balancer, size)

    monkeypatch.setattr(Balancer, "resize", early)
    account = run()
    assert account.refused > 0
    assert account.destroyed == 0
    assert account.sent == account.received + account.refused
