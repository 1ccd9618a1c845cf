"""Whose job comes next: by what callers have taken, over their weights."""

import asyncio

from shardinit.service.server.pipe import Task
from shardinit.service.server.turns import Job, Turns


def served(jobs, taken, count):
    """The callers of the first `count` jobs, each of which takes `taken` seconds."""

    async def serve():
        turns = Turns()
        for caller, weight in jobs:
            turns.add(Job(Task("DescribeModel", "", b""), caller, weight=weight))
        order = []
        for _ in range(count):
            job = turns.take(lambda job: True)
            turns.charge(job, taken)
            order.append(job.caller)
        return order, len(turns)

    return asyncio.run(serve())


def test_callers_take_turns_however_many_jobs_each_has():
    jobs = [("many", 1)] * 6 + [("few", 1)] * 2
    assert served(jobs, 1.0, 4) == (["many", "few", "many", "few"], 4)


def test_a_weight_of_three_has_three_turns_to_one():
    order, left = served([("light", 1)] * 8 + [("heavy", 3)] * 8, 1.0, 8)
    assert order.count("heavy") == 6
    assert left == 8


def test_one_who_comes_late_is_on_a_par_with_who_has_had_least():
    async def serve():
        turns = Turns()
        early = [Job(Task("DescribeModel", "", b""), "early") for _ in range(4)]
        for job in early:
            turns.add(job)
        for _ in range(2):
            turns.charge(turns.take(lambda job: True), 10.0)
        for _ in range(3):
            turns.add(Job(Task("DescribeModel", "", b""), "late"))
        order = []
        while (job := turns.take(lambda job: True)) is not None:
            turns.charge(job, 10.0)
            order.append(job.caller)
        return order

    # not three of the late one's in a row for all that the early one has had before
    assert asyncio.run(serve()) == ["late", "early", "late", "early", "late"]


def test_what_suits_nobody_waits_and_what_is_given_back_comes_first():
    async def serve():
        turns = Turns()
        first, second = (
            Job(Task(name, "", b""), "a") for name in ("Build", "Describe")
        )
        turns.add(first)
        turns.add(second)
        assert turns.take(lambda job: False) is None
        assert len(turns) == 2
        assert turns.take(lambda job: job is second) is second
        turns.add(second, first=True)
        assert turns.take(lambda job: True) is second
        turns.remove(first)
        turns.remove(first)  # once more does nothing
        return len(turns)

    assert asyncio.run(serve()) == 0
