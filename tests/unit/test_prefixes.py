"""Drawn rule sets: as many as asked, all different, the destination's own among them, the same for the same seed."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecv.bench import prefixes

CASES = [
    (socket.AF_INET, "192.0.2.1", "192.0.2.0/24", 16, 24),
    (socket.AF_INET6, "2001:db8::1", "2001:db8::/64", 32, 64),
]


@pytest.mark.parametrize(("family", "destination", "own", "shortest", "longest"), CASES)
@settings(max_examples=30, deadline=None)
@given(entries=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_what_is_drawn(
    family: int, destination: str, own: str, shortest: int, longest: int, entries: int, seed: int
) -> None:
    lengths, addresses = prefixes.draw(family, destination, entries, seed)
    networks = [
        ip_network((bytes(address), int(length))) for length, address in zip(lengths, addresses, strict=True)
    ]  # strict: host bits set would be a ValueError
    assert len(networks) == len(set(networks)) == entries
    assert networks[0] == ip_network(own)
    assert all(shortest <= network.prefixlen <= longest for network in networks)
    assert ip_address(destination) in networks[0]


def test_the_seed_decides() -> None:
    first, again, other = (prefixes.draw(socket.AF_INET, "192.0.2.1", 300, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_a_hundred_thousand_are_found_though_short_prefixes_run_out() -> None:
    lengths, _ = prefixes.draw(socket.AF_INET, "192.0.2.1", 100_000, 1)
    counts = np.bincount(lengths)[16:25]
    assert counts.sum() == 100_000
    assert counts.min() > 9_000


def test_the_description_names_number_and_seed() -> None:
    assert "10, 1,000 prefixes (seed 3)" in prefixes.describe([1000, 10, 10], 3)
    assert prefixes.describe([], 3) == "none"
