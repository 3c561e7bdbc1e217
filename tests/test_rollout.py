"""The rollout engine against a real vLLM server: what it samples, how weights get in, and what happens when a server dies."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from processes import in_group, is_soon, stat, threads
from servers import checkpoint_weights, logprobs

from megatron_r1.rollout.engine import EngineError, EngineLost, Request, SamplingParams
from megatron_r1.rollout.vllm_server import VLLMServers

PROMPTS = [torch.randint(3, 320, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
FIXED = torch.randint(3, 320, (64,), generator=torch.Generator().manual_seed(9)).tolist()


def requests(*, seed: int = 7) -> list[Request]:
    return [Request(i, prompt, seed=1000 * seed + 100 * i) for i, prompt in enumerate(PROMPTS)]


def put(server, model, version: int) -> None:
    server.engine.update_weights(checkpoint_weights(model), version)


def generate(engine, some, **sampling) -> dict:
    return dict(engine.generate(some, SamplingParams(**{"max_tokens": 12, "n": 4, **sampling})))


def under_way(server) -> int:
    """How many requests for completions the server has taken and not answered."""
    load = server.engine.servers.call(server.process.url, "/load", method="GET")
    return server.engine.servers.submit(load).result()["server_load"]


def test_completions_carry_the_sampler_s_own_logprobs_and_why_they_ended(server):
    put(server, server.old, 1)
    stops = tuple(range(0, 320, 10))
    reasons = set()
    for key, group in generate(server.engine, requests(), temperature=0.7, stop_token_ids=stops, max_tokens=20).items():
        for c in group:
            expected = logprobs(server.old, PROMPTS[key] + c.token_ids, temperature=0.7)[len(PROMPTS[key]) - 1 :]
            assert c.logprobs == pytest.approx(expected, abs=1e-4)
            assert [t in stops for t in c.token_ids] == [False] * (len(c.token_ids) - 1) + [c.finish_reason == "stop"]
            assert c.finish_reason == "stop" or len(c.token_ids) == 20
            assert c.weight_version == 1
            reasons.add(c.finish_reason)
    assert reasons == {"stop", "length"}


def test_completions_of_a_group_differ_and_a_seed_repeats_them_in_any_company(server):
    put(server, server.old, 1)
    first = generate(server.engine, requests())
    alone = generate(server.engine, requests()[2:3])
    assert [c.token_ids for c in alone[2]] == [c.token_ids for c in first[2]]
    assert len({tuple(c.token_ids) for group in first.values() for c in group}) == 16
    assert generate(server.engine, requests(seed=8))[2] != first[2]


def test_an_engine_s_groups_share_a_thread_and_those_that_bring_weights_another(server):
    put(server, server.old, 1)
    names = [name for pid in in_group(server.process.process.pid) for name in threads(pid)]
    assert names.count("gloo_tcp_loop") == 2


def test_groups_arrive_one_by_one(server):
    put(server, server.old, 1)
    arrivals = [key for key, _ in server.engine.generate(requests() * 4, SamplingParams(max_tokens=4, n=16))]
    assert sorted(arrivals) == sorted([0, 1, 2, 3] * 4)
    one = server.engine.generate(requests(), SamplingParams(max_tokens=200, n=8))
    next(one)
    one.close()  # aborts the rest
    assert generate(server.engine, requests()[:1])


def test_a_request_to_stop_aborts_what_still_runs(server):
    put(server, server.old, 1)
    noted = threading.Event()
    many = [Request(i, [3, 4, 5], seed=i) for i in range(100)]
    arrived = []
    for key, _ in server.engine.generate(many, SamplingParams(max_tokens=8, n=16), stop=noted.is_set):
        arrived.append(key)
        noted.set()
    assert len(arrived) == 1
    assert generate(server.engine, requests()[:1]), "the server goes on"


def test_an_update_changes_logprobs_to_the_trainer_s_and_so_does_the_next(server):
    server.engine.buckets.bucket_bytes = 1 << 16  # many buckets, layers split over them
    for version, model in enumerate((server.old, server.new, server.old), start=1):
        put(server, model, version)
        assert server.engine.canary(FIXED, logprobs(model, FIXED), tolerance=1e-4) <= 1e-4
        assert {c.weight_version for c in generate(server.engine, requests())[0]} == {version}


def test_the_canary_names_the_server_and_the_largest_gap(server):
    put(server, server.old, 5)
    expected = logprobs(server.old, FIXED)
    expected[10] += 0.5
    message = rf"{server.process.url}: log-probs of weights 5 differ .* by 0\.5 .* at token 11 \({FIXED[11]}\)"
    with pytest.raises(EngineError, match=message):
        server.engine.canary(FIXED, expected, tolerance=1e-3)
    expected[10] = float("nan")
    with pytest.raises(EngineError, match="by inf"):
        server.engine.canary(FIXED, expected, tolerance=1e-3)


def test_requests_in_flight_are_kept_through_an_update_and_count_as_the_old_version(server):
    put(server, server.old, 20)
    keeping = VLLMServers([server.process.url], max_num_seqs=32, pause="keep")
    groups: dict = {}
    before = under_way(server)
    thread = threading.Thread(target=lambda: groups.update(generate(server.engine, requests()[:1], max_tokens=200)))
    thread.start()
    assert is_soon(lambda: under_way(server) > before)
    for _ in range(3):  # the server takes requests in order: when these are done, the long one runs
        generate(keeping, requests()[1:2], max_tokens=1, n=1)
    keeping.update_weights(checkpoint_weights(server.new), 21)
    thread.join(120)
    keeping.close()
    assert [len(c.token_ids) for c in groups[0]] == [200] * 4
    assert {c.weight_version for c in groups[0]} == {20}
    prompt, c = PROMPTS[0], groups[0][0]
    old = logprobs(server.old, prompt + c.token_ids)[len(prompt) - 1 :]
    assert c.logprobs[0] == pytest.approx(old[0], abs=1e-4)
    assert c.logprobs[-1] != pytest.approx(old[-1], abs=1e-2), "the update did not fall into the request"


def group_rss_mib(leader: int) -> float:
    """Resident memory of all processes in a process group."""
    pages = [int(page) for pid in in_group(leader) for page in stat(pid)[21:22]]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_20_updates_do_not_grow_the_server(server):
    for version in range(30, 33):
        put(server, server.old, version)
    before = group_rss_mib(server.process.process.pid)
    for version in range(33, 53):
        put(server, server.new, version)
    assert before > 100
    assert group_rss_mib(server.process.process.pid) - before < 16


@pytest.mark.slow
def test_a_server_killed_in_the_middle_comes_back_and_loses_nothing(server):
    put(server, server.old, 60)
    long = {"max_tokens": 200, "n": 8}
    before, started = under_way(server), time.monotonic()
    expected = generate(server.engine, requests(), **long)
    seconds, killed = time.monotonic() - started, []

    def kill() -> None:
        assert is_soon(lambda: under_way(server) == before + len(PROMPTS))
        time.sleep(seconds / 3)
        killed.append(time.monotonic())
        os.killpg(server.process.process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = {}
    with pytest.raises(EngineLost, match="requests lost") as lost:
        found.update(server.engine.generate(requests(), SamplingParams(**long)))
    assert time.monotonic() - killed[0] < 20.0
    thread.join()

    server.process.restart()
    put(server, server.old, 60)  # waits until it is ready, and opens the transfer anew
    found |= generate(server.engine, [r for r in requests() if r.key in lost.value.missing], **long)
    assert {key: [c.token_ids for c in group] for key, group in found.items()} == {
        key: [c.token_ids for c in group] for key, group in expected.items()
    }
