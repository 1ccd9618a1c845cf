"""The short forms of what docs/reliability.md measures."""

import pytest

from shardinit.models import ModelSpec
from tests.reliability import cancels, clients, crowd, fuzz, kills, mangle, rest, soak

pytestmark = pytest.mark.once


def test_messages_that_are_nearly_right_are_no_fault_of_the_service():
    codes, _ = fuzz.measure(1500)
    assert sum(codes.values()) == 1500
    assert not {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"} & set(codes)
    assert codes["INVALID_ARGUMENT"] > 100


def test_damaged_programs_are_read_or_refused():
    ends = mangle.parse(1000)
    assert sum(ends.values()) == 1000
    assert ends["refused"] > 500


def test_programs_that_were_sealed_anew_are_refused_or_run_by_the_service():
    ends = mangle.execute(4)
    assert sum(ends.values()) == 4
    assert set(ends) <= {"executed", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
    assert ends["executed"]
    assert ends["INVALID_ARGUMENT"]


def test_streams_end_with_the_right_bytes_whatever_is_killed():
    spec = ModelSpec("bench-random", {"rows": 1 << 13})
    expected, digests, killed = kills.measure(spec, 2, most=1.0)
    assert killed == ["front", "worker"]
    assert digests
    assert set(digests) == {expected}


def test_no_worker_goes_on_after_its_caller_has_cancelled():
    found = cancels.measure(1)  # raises where one goes on for half a minute
    assert {name: len(seconds) for name, seconds in found.items()} == {
        "build": 1,
        "stream": 1,
    }


@pytest.mark.slow
def test_the_process_that_listens_rests_near_what_it_began_with():
    before, loaded, after = rest.measure(clients.uploads, 8, 5)
    assert loaded > before + 50e6  # else there was no load
    assert after < before + 30e6


@pytest.mark.slow
def test_honest_reads_are_right_beside_the_worst_clients():
    ends, held = soak.measure(6, 1, kill_every=2.0)
    assert ends["right"]
    assert not ends["wrong"] + ends["stuck"]
    assert ends["killed"]
    assert held


@pytest.mark.slow
def test_a_crowd_that_asks_for_one_model_is_served_by_its_one_build():
    ends, _ = crowd.measure(100, 2.0, processes=2)
    assert ends == {"OK": 100}
