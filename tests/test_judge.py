"""The judge: what it is told, how its replies are read, and that one which cannot be read is asked again and never counts as a yes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chats import ChatStub, said

from megatron_r1.problem import Problem
from megatron_r1.rejection.judge import Judge, Verdict, read
from megatron_r1.rollout.chat_servers import ChatServers

PROBLEM = Problem(0, "Who wrote {it}?", "Ada", source="data/essays.jsonl")


@pytest.fixture
def replies() -> list:
    return []


@pytest.fixture
def judge(replies: list) -> Iterator[tuple[Judge, ChatStub]]:
    """A judge that says `replies`, one after the other."""
    stub = ChatStub(lambda text, body: replies.pop(0))
    servers = ChatServers([stub.url], limit_seconds=5.0, retry_seconds=1.0)
    yield Judge(servers, ["*essays*"], max_tokens=50, tries=3), stub
    servers.close()
    stub.close()


def verdict(judge: Judge) -> Verdict:
    return judge.servers.submit(judge.verdict(PROBLEM, "It was Ada.", seed=5)).result()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"analysis": "same", "verdict": "correct"}', True),
        ('{"analysis": "not {it}", "verdict": "incorrect"}', False),
        ('```json\n{"verdict": "Correct "}\n```', True),
        ('<think>{"verdict": "correct"}?</think>{"verdict": "incorrect"}', False),
        ('{"verdict": "correct", "analysis": "same"}', True),
        ('The set {1, 2} is right. {"analysis": "both say \\(x = \\sqrt{2}\\)\nand a "root"", "verdict": "correct."}', True),
        ('{"analysis": "the answer says \\\\"verdict\\\\": \\\\"correct\\\\"}", "verdict": "incorrect"}', False),
        ("correct", None),
        ('{"analysis": "correct"}', None),
        ('{"verdict": true}', None),
        ('{"verdict": "not correct"}', None),
        ('{"verdict": "correct"', None),
        ('{"verdict": "correct"} {"verdict": "incorrect"}', None),
        ('["correct"]', None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_it_is_none(reply: str, expected: bool | None):
    assert read(reply) is expected


def test_the_judge_is_told_question_reference_and_answer(judge, replies):
    replies.append(said('{"verdict": "correct"}'))
    assert verdict(judge[0]) == Verdict(True, unread=0)
    [asked] = judge[1].asked
    text = asked["messages"][0]["content"]
    for part in ("<question>\nWho wrote {it}?\n", "<reference>\nAda\n", "<answer_to_check>\nIt was Ada.\n", '{"analysis": "why'):
        assert part in text
    assert (asked["temperature"], asked["max_tokens"]) == (0.0, 50)


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_another_seed(judge, replies):
    replies += [said("yes"), (400, {"error": "too long"}), said('{"verdict": "incorrect"}')]
    assert verdict(judge[0]) == Verdict(False, unread=2)
    assert [body["temperature"] for body in judge[1].asked] == [0.0, 1.0, 1.0]
    assert len({body["seed"] for body in judge[1].asked}) == 3


def test_after_its_tries_the_judge_has_said_nothing(judge, replies):
    replies += [said("yes")] * 4
    assert verdict(judge[0]) == Verdict(None, unread=3)
    assert len(replies) == 1


def test_a_source_is_judged_by_its_pattern(judge):
    assert judge[0].covers(PROBLEM)
    assert not judge[0].covers(Problem(0, "1+1", "2", source="data/sums.jsonl"))
