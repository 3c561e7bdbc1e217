"""Chats with servers that are slow, overloaded, gone or not what they should be: one line each, and no request lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from chats import ChatStub, said

from megatron_r1.processes import free_port
from megatron_r1.rollout.chat_servers import ChatServers, Reply
from megatron_r1.rollout.engine import EngineError, SamplingParams
from megatron_r1.rollout.servers import NotReady, Refused

SAMPLING = SamplingParams(max_tokens=9, temperature=0.6, top_p=0.95)


@pytest.fixture
def made() -> Iterator[Callable]:
    """Makes servers and clients, and closes them."""
    parts: list = []

    def make(kind: type, *arguments: object, **settings: object) -> object:
        if kind is ChatServers:
            settings = {"limit_seconds": 5.0, "retry_seconds": 2.0, **settings}
        parts.append(kind(*arguments, **settings))
        return parts[-1]

    yield make
    for part in reversed(parts):
        part.close()


def ask(client: ChatServers, *texts: str) -> list[Reply]:
    async def every() -> list[Reply]:
        return await asyncio.gather(*(client.ask(text, SAMPLING, seed=i) for i, text in enumerate(texts)))

    return client.submit(every()).result()


def test_a_request_carries_the_sampling_the_seed_the_model_and_the_key(made):
    stub = made(ChatStub, lambda text, body: said(text.upper(), tokens=3))
    client = made(ChatServers, [stub.url + "/v1/"], api_key="secret")
    assert client.wait_ready(10.0) == "org/teacher"
    assert ask(client, "a", "b") == [Reply("A", 3, "stop"), Reply("B", 3, "stop")]
    [one] = [body for body in stub.asked if body["seed"] == 1]
    messages = [{"role": "user", "content": "b"}]
    assert one == {"model": "teacher", "messages": messages, "temperature": 0.6, "top_p": 0.95, "max_tokens": 9, "seed": 1}
    assert set(stub.keys) == {"Bearer secret"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_the_server_parts_is_put_back_into_its_tags(made, name: str):
    client = made(ChatServers, [made(ChatStub, lambda text, body: said("3", **{name: "\nhm\n"})).url])
    assert ask(client, "a")[0].text == "<think>\nhm\n</think>\n\n3"


def test_an_overloaded_server_is_asked_again_and_a_dead_one_is_left_for_another(made):
    answers = iter([(429, {}), (503, {}), said("late")])
    stub = made(ChatStub, lambda text, body: next(answers))
    assert ask(made(ChatServers, [stub.url]), "a")[0].text == "late"
    alive = made(ChatStub, lambda text, body: said("alive"))
    dead = f"http://127.0.0.1:{free_port()}"
    assert {r.text for r in ask(made(ChatServers, [dead, alive.url]), *"abcdef")} == {"alive"}
    with pytest.raises(EngineError, match="the server is gone"):
        ask(made(ChatServers, [dead], retry_seconds=0.3), "a")


def test_a_refusal_is_final_and_passed_on(made):
    stub = made(ChatStub, lambda text, body: (400, {"error": {"message": "prompt is too long"}}))
    with pytest.raises(Refused, match="HTTP 400: prompt is too long") as error:
        ask(made(ChatServers, [stub.url]), "a")
    assert error.value.status == 400
    assert len(stub.asked) == 1


def test_an_answer_of_another_kind_is_a_one_line_error(made):
    stub = made(ChatStub, lambda text, body: (200, {"text": "hello"}))
    with pytest.raises(EngineError, match="its answer has no 'choices'; is this an OpenAI-compatible server"):
        ask(made(ChatServers, [stub.url]), "a")


def test_in_flight_bounds_the_requests_under_way(made):
    under_way, most = [0], [0]

    async def slow(*_: object, **__: object) -> dict:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0.01)
        under_way[0] -= 1
        return said("a")[1]

    client = made(ChatServers, ["http://127.0.0.1:1"], in_flight=3)
    client.servers.call = slow
    assert len(ask(client, *"abcdefgh")) == 8
    assert most == [3]


def test_the_model_is_the_one_that_is_served_or_the_one_that_is_named(made):
    def served(*ids: str) -> str:
        return made(ChatStub, lambda text, body: said("a"), {"data": [{"id": i} for i in ids]}).url

    assert made(ChatServers, [served("a", "b")], model="b").wait_ready(10.0) == "b"
    for urls, model, message in (
        ([served("a", "b")], "", "serves not one model but a, b; name one of them"),
        ([served("a")], "c", "serves no model 'c' but a"),
        ([served("a"), served("b")], "", r"serve different models \(a, b\)"),
    ):
        with pytest.raises(ValueError, match=message):
            made(ChatServers, urls, model=model).wait_ready(10.0)
    with pytest.raises(NotReady, match="no answer in time"):
        made(ChatServers, [f"http://127.0.0.1:{free_port()}"]).wait_ready(0.3)
