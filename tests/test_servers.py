"""The client against servers that misbehave: every failure is one line, in time, and no request is lost silently."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_r1.processes import free_port
from megatron_r1.rollout import weight_transfer, wire
from megatron_r1.rollout.engine import EngineError, EngineLost, Request, SamplingParams
from megatron_r1.rollout.sampling import sample_groups
from megatron_r1.rollout.vllm_server import VLLMServers
from megatron_r1.rollout.weight_transfer import IpcSender, make_sender, rank_offsets
from megatron_r1.types import Problem
from megatron_r1.weights.division import Division, TensorInfo

Answer = tuple[int, object]


class Stub:
    """An HTTP server that answers as `replies` say, by path, and keeps what it was asked."""

    def __init__(self, **replies: Callable[[dict], Answer]) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.version = "default"
        self.replies = {"/inference/v1/generate": self.completions, "/weight_info": lambda _: (200, {"weight_version": self.version})}
        self.replies |= {"/get_world_size": lambda _: (200, {"world_size": 1}), "/reset_prefix_cache": lambda _: (200, {"success": True})}
        self.replies |= {"/" + path: reply for path, reply in replies.items()}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                stub.asked.append((self.path, body))
                status, answer = stub.replies.get(self.path.partition("?")[0], lambda _: (200, {}))(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that gave up closes its socket
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def completions(self, body: dict) -> Answer:
        spans = [{"version": self.version, "start": 0, "end": 1}]
        choice = {"token_ids": [5], "finish_reason": "length", "logprobs": {"content": [{"logprob": -1.0}]}, "weight_versions": spans}
        return 200, {"choices": [choice | {"index": i} for i in range(body["sampling_params"]["n"])]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    made: list[Stub] = []

    def make(**replies: Callable[[dict], Answer]) -> Stub:
        made.append(Stub(**replies))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def client() -> Iterator[Callable[..., VLLMServers]]:
    made: list[VLLMServers] = []

    def make(*urls: str, **settings) -> VLLMServers:
        made.append(VLLMServers(urls, **{"request_limit_seconds": 5.0, "start_limit_seconds": 10.0, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(engine: VLLMServers, *, count: int = 6, n: int = 2) -> dict:
    return dict(engine.generate([Request(i, [3, 4], seed=i) for i in range(count)], SamplingParams(max_tokens=1, n=n)))


def plain(stub: Callable[..., Stub], **changes: object) -> Stub:
    """A `vllm serve` as anyone starts it: OpenAI's API, and a refusal where the tokens' endpoint would be."""

    def completions(body: dict) -> Answer:
        choice = {"token_ids": [5, 1], "finish_reason": "stop", "text": "five"} | changes
        return 200, {"choices": [choice | {"index": i} for i in reversed(range(body["n"]))]}

    return stub(
        **{
            "openapi.json": lambda _: (200, {"paths": {"/v1/completions": {}}}),
            "v1/models": lambda _: (200, {"data": [{"id": "some/model"}]}),
            "v1/completions": completions,
            "inference/v1/generate": lambda _: (403, {"error": {"message": "Scale-out endpoints are disabled."}}),
        }
    )


def test_a_plain_vllm_server_is_asked_by_openai_s_api_with_nothing_left_to_its_defaults(stub, client):
    one = plain(stub)
    engine = client(one.url, own_weights=True)
    engine.wait_ready(5.0)
    found = dict(engine.generate([Request(0, [3, 4], seed=9)], SamplingParams(max_tokens=7, temperature=0.6, top_p=0.95, n=2)))
    assert [(c.token_ids, c.finish_reason, c.weight_version) for c in found[0]] == [([5, 1], "stop", -1)] * 2
    assert all(math.isnan(value) for c in found[0] for value in c.logprobs), "not the sampler's, so nobody may train on them"
    [body] = [body for path, body in one.asked if path == "/v1/completions"]
    assert (body["model"], body["prompt"], body["seed"], body["n"], body["max_tokens"]) == ("some/model", [3, 4], 9, 2, 7)
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.6, 0.95, 0, 1.0)


def test_plain_servers_and_our_own_answer_side_by_side(stub, client):
    ours = stub(**{"openapi.json": lambda _: (200, {"paths": {"/inference/v1/generate": {}}})})
    engine = client(plain(stub).url, ours.url, own_weights=True)
    engine.wait_ready(5.0)
    assert list(engine.models.values()) == ["some/model"]
    assert sorted(ask(engine)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"token_ids": None}, "without token ids.* vLLM 0.10.2"), ({"finish_reason": "abort"}, "a completion ended with 'abort'")],
)
def test_an_answer_that_cannot_be_counted_is_an_error(stub, client, changes: dict, message: str):
    engine = client(plain(stub, **changes).url, own_weights=True)
    engine.wait_ready(5.0)
    with pytest.raises(EngineError, match=message):
        ask(engine)


def test_what_lost_servers_took_with_them_is_sampled_again_with_the_same_seeds(stub, client):
    failures = iter([True, False, True])

    def sometimes(body: dict) -> Answer:
        return (500, {}) if next(failures, False) else one.completions(body)

    healthy = iter([True, False, False])  # ready; dead when asked after the first refusal, and after the second
    one = stub(
        **{
            "inference/v1/generate": sometimes,
            "health": lambda _: (200, {}) if next(healthy, True) else (503, {}),
            "openapi.json": lambda _: (200, {"paths": {"/inference/v1/generate": {}}}),
        }
    )
    engine = client(one.url, own_weights=True, max_num_seqs=2)
    engine.wait_ready(5.0)
    prompts = [(Problem(i, f"p{i}", "1"), [3, 4 + i]) for i in range(3)]
    groups = list(sample_groups(engine, prompts, SamplingParams(max_tokens=1, n=2), seed=1, restart_seconds=5.0))
    assert sorted(group[0].problem.id for group in groups) == [0, 1, 2]
    assert all([s.group_index for s in group] == [0, 1] for group in groups)
    seeds = {tuple(body["token_ids"]): body["sampling_params"]["seed"] for path, body in one.asked if path == "/inference/v1/generate"}
    assert len(seeds) == len(set(seeds.values())) == 3
    asked = [body["sampling_params"]["seed"] for path, body in one.asked if path == "/inference/v1/generate"]
    assert len(asked) > len(set(asked)) == 3, "asked again, with the seed of its own"


def test_servers_that_never_stay_end_the_evaluation(stub, client):
    turns = iter(range(1000))
    broken = stub(**{"inference/v1/generate": lambda _: (500, {}), "health": lambda _: (200 if next(turns) % 2 == 0 else 503, {})})
    broken.replies["/openapi.json"] = lambda _: (200, {"paths": {"/inference/v1/generate": {}}})
    engine = client(broken.url, own_weights=True)
    engine.wait_ready(5.0)
    prompts = [(Problem(0, "p", "1"), [3])]
    with pytest.raises(EngineError, match="lost 4 times in one run"):
        list(sample_groups(engine, prompts, SamplingParams(max_tokens=1), seed=1, restart_seconds=5.0))


def dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_an_answer_that_takes_too_long_is_an_error_with_its_limit(stub, client):
    slow = stub(**{"inference/v1/generate": lambda body: time.sleep(10.0) or (200, {})})
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"/inference/v1/generate: no answer within 0.4 s; raise rollout.request_timeout_seconds"):
        ask(client(slow.url, request_limit_seconds=0.4))
    assert time.monotonic() - started < 8.0


def test_a_refusal_is_passed_on_in_one_line(stub, client):
    refusing = stub(**{"inference/v1/generate": lambda body: (400, {"error": {"message": "prompt\nis too long"}})})
    with pytest.raises(EngineError, match=r"/inference/v1/generate: HTTP 400: prompt is too long$"):
        ask(client(refusing.url))


def test_a_dead_engine_behind_a_live_server_counts_as_lost(stub, client):
    broken = stub(**{"inference/v1/generate": lambda body: (500, {"error": "engine"}), "health": lambda body: (503, {})})
    with pytest.raises(EngineLost, match="6 requests lost") as error:
        ask(client(broken.url))
    assert sorted(error.value.missing) == [0, 1, 2, 3, 4, 5]


def test_an_error_of_a_live_engine_is_not_retried(stub, client):
    broken = stub(**{"inference/v1/generate": lambda body: (500, {"error": "out of memory"})})
    with pytest.raises(EngineError, match="HTTP 500: out of memory"):
        ask(client(broken.url), count=1)
    assert [path for path, _ in broken.asked].count("/inference/v1/generate") == 1


def test_the_requests_of_a_dead_server_go_to_the_others(stub, client):
    alive = stub()
    alive.version = "3"
    groups = ask(client(dead_url(), alive.url))
    assert sorted(groups) == [0, 1, 2, 3, 4, 5]
    assert {c.weight_version for group in groups.values() for c in group} == {3}


def test_a_restarted_server_samples_nothing_until_it_has_weights(stub, client):
    restarted = stub()
    with pytest.raises(EngineLost, match="no server with the policy's weights is left"):
        ask(client(restarted.url))
    assert ask(client(restarted.url, own_weights=True))[0][0].weight_version == -1


def test_requests_spread_over_servers_by_what_each_gets_done(stub, client):
    def slowly(body: dict) -> Answer:
        time.sleep(0.2)
        return fast.completions(body)

    fast, slow = stub(), stub(**{"inference/v1/generate": slowly})
    fast.version = slow.version = "1"
    assert len(ask(client(fast.url, slow.url, max_num_seqs=2), count=40)) == 40
    assert len(fast.asked) > 3 * len(slow.asked) > 0
    assert len(ask(client(fast.url, slow.url), count=2)) == 2
    assert len(slow.asked) >= 2, "two requests go to two servers"


def test_no_more_requests_are_open_at_a_time_than_the_process_may_have_files(stub, client):
    def counted(body: dict) -> Answer:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return servers[0].completions(body)

    running, most = [], []
    servers = [stub(**{"inference/v1/generate": counted}) for _ in range(2)]
    servers[0].version = servers[1].version = "1"
    for urls in ([servers[0].url], [s.url for s in servers]):
        engine = client(*urls)
        engine.servers.most_open = 6
        assert len(ask(engine, count=60)) == 60
    assert 1 < max(most) <= 6


def test_the_limit_of_open_files_is_raised_for_the_requests():
    code = (
        "import resource as r; hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, hard));"
        "from megatron_r1.rollout.servers import open_files; print(open_files() == r.getrlimit(r.RLIMIT_NOFILE)[0] == min(hard, 65535))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.strip() == "True", done.stderr


def test_waiting_for_servers_ends_at_its_limit_and_names_the_missing(stub, client):
    url = dead_url()
    with pytest.raises(EngineError, match=rf"^{url}: not ready after 3 s; raise rollout.start_timeout_seconds"):
        client(stub().url, url).wait_ready(3.0)


def test_a_server_that_dies_in_an_update_is_news_and_the_next_one_starts_anew_on_all(stub, client, tmp_path):
    living, dying = stub(), stub(update_weights=lambda body: (500, {"error": "engine"}))
    dying.replies["/health"] = lambda body: (503 if "/update_weights" in dict(dying.asked) else 200, {})
    engine = client(living.url, dying.url, weight_transfer="file", transfer_folder=tmp_path)
    with pytest.raises(EngineLost, match="the engine is dead"):
        engine.update_weights({"a": torch.ones(2)}.items(), 7)
    dying.replies |= {"/health": lambda body: (200, {}), "/update_weights": lambda body: (200, {})}
    living.asked.clear()
    engine.update_weights({"a": torch.ones(2)}.items(), 7)
    steps = [path for path, _ in living.asked if path not in ("/weight_info", "/health", "/get_world_size")]
    assert steps[:3] == ["/init_weight_transfer_engine", "/pause?mode=wait", "/start_weight_update"]


def test_a_server_that_a_dead_trainer_left_in_the_middle_of_an_update_starts_anew(stub, client, tmp_path):
    def start(body: dict) -> Answer:
        is_free = "/finish_weight_update" in dict(server.asked)
        return (200, {}) if is_free else (500, {"error": "start_weight_update called while a weight update is already active"})

    server = stub(start_weight_update=start)
    client(server.url, weight_transfer="file", transfer_folder=tmp_path).update_weights({"a": torch.ones(2)}.items(), 7)
    steps = [(path, body) for path, body in server.asked if path.endswith("weight_update")]
    assert steps[:3] == [
        ("/start_weight_update", {}), ("/finish_weight_update", {"weight_version": "-1"}), ("/start_weight_update", {}),
    ]  # fmt: skip
    assert steps[3:] == [("/finish_weight_update", {"weight_version": "7"})]


def test_an_update_pauses_sends_names_the_version_drops_caches_and_resumes(stub, client, tmp_path):
    sent: dict[str, torch.Tensor] = {}
    server = stub(update_weights=lambda body: sent.update(load_file(tmp_path / body["update_info"]["file"])) or (200, {}))
    engine = client(server.url, weight_transfer="file", transfer_folder=tmp_path)
    fused = torch.arange(12.0).view(4, 3)
    weights = {"a": fused[:2], "b": fused[2:], "c": torch.ones(3, dtype=torch.bfloat16)}
    engine.update_weights(weights.items(), 7)
    steps = [path for path, _ in server.asked if path not in ("/weight_info", "/health", "/get_world_size")]
    assert steps[0] == "/init_weight_transfer_engine"
    assert steps[1:] == [
        "/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume",
    ]  # fmt: skip
    assert ("/finish_weight_update", {"weight_version": "7"}) in server.asked
    assert {name: t.tolist() for name, t in sent.items()} == {name: t.tolist() for name, t in weights.items()}
    assert not list(tmp_path.iterdir())

    server.version, server.asked = "7", []
    engine.update_weights(weights.items(), 8)
    assert "/init_weight_transfer_engine" not in [path for path, _ in server.asked], "the way is still open"
    server.version, server.asked = "default", []
    engine.update_weights(weights.items(), 9)
    assert "/init_weight_transfer_engine" in [path for path, _ in server.asked], "the server was restarted"


def test_an_update_that_fails_leaves_the_servers_paused(stub, client, tmp_path):
    server = stub(update_weights=lambda body: (500, {"error": "no such layer"}))
    with pytest.raises(EngineError, match="/update_weights: HTTP 500: no such layer"):
        client(server.url, weight_transfer="file", transfer_folder=tmp_path).update_weights([("a", torch.ones(1))], 1)
    assert "/resume" not in [path for path, _ in server.asked]


def test_a_server_that_refuses_the_gloo_group_does_not_hold_the_trainer(stub, client):
    server = stub(init_weight_transfer_engine=lambda body: (500, {"error": "gloo is not registered"}))
    started = time.monotonic()
    with pytest.raises(EngineError, match="gloo is not registered"):
        client(server.url).update_weights([("a", torch.ones(1))], 1)
    assert time.monotonic() - started < 20.0


def test_a_cache_of_old_weights_that_stays_is_an_error(stub, client, tmp_path):
    server = stub(reset_prefix_cache=lambda body: (200, {"success": False}))
    with pytest.raises(EngineError, match="prefix cache of the old weights could not be dropped"):
        client(server.url, weight_transfer="file", transfer_folder=tmp_path).update_weights([("a", torch.ones(1))], 1)


def test_other_ranks_walk_through_the_export_and_send_nothing(stub, client):
    server = stub()
    walked = []
    rank_1 = SimpleNamespace(rank=lambda: 1, share=lambda value: value, any_rank=lambda flag: flag, together=lambda: None)
    client(server.url, ranks=rank_1).update_weights((walked.append(i) or ("a", torch.ones(1)) for i in range(3)), 1)
    assert (walked, server.asked) == ([0, 1, 2], [])


class Together:
    """Two ranks in threads that tell each other, in step, what mcore/distributed.py lets ranks tell."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2, timeout=10.0), {}

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.said[rank] = value
        self.barrier.wait()
        values = [self.said[0], self.said[1]]
        self.barrier.wait()
        return values

    def of(self, rank: int) -> SimpleNamespace:
        said = {"share": lambda value: self.gather(rank, value)[0], "any_rank": lambda flag: any(self.gather(rank, flag))}
        return SimpleNamespace(rank=lambda: rank, together=self.barrier.wait, **said)


class CannotJoin:
    """The sender of a rank that never gets to the servers."""

    def join(self, meeting: object, division: Division) -> None:
        raise EngineError("no way")

    def close(self) -> None: ...


@pytest.mark.parametrize("fault", ["a server dies before the update", "a server dies when it is to begin", "another rank cannot join"])
def test_no_rank_is_left_alone_in_an_update_that_fails_before_anything_is_sent(stub, client, tmp_path, fault):
    where = {"a server dies before the update": "/get_world_size", "a server dies when it is to begin": "/start_weight_update"}.get(fault)
    server, together, walked = stub(), Together(), []
    if where is not None:
        server.replies |= {where: lambda body: (500, {"error": "engine"})}
        server.replies["/health"] = lambda body: (503 if where in dict(server.asked) else 200, {})

    def rank(number: int) -> None:
        engine = client(server.url, ranks=together.of(number), weight_transfer="file", transfer_folder=tmp_path)
        if number == 1 and fault == "another rank cannot join":
            engine.sender = CannotJoin()
        weights = (walked.append(number) or ("a", torch.ones(1)) for _ in range(3))
        engine.update_weights(weights, 1, division=Division([(), ()], mine=number))

    with ThreadPoolExecutor(2) as ranks:
        for done in [ranks.submit(rank, number) for number in range(2)]:
            with pytest.raises(EngineLost):
                done.result()
    assert walked == []


class Worker:
    """A server's worker, which reads as vllm_engines.py does, over gloo; it dies as it is asked for round number `dies`."""

    def __init__(self, stub: Callable[..., Stub], *, dies: int | None = None) -> None:
        self.got: dict[str, torch.Tensor] = {}
        self.groups: list[dist.ProcessGroup] = []
        self.dies, self.rounds = dies, 0
        health = lambda body: (503 if self.is_dead else 200, {})  # noqa: E731
        self.server = stub(init_weight_transfer_engine=self.meet, update_weights=self.receive, health=health)

    @property
    def is_dead(self) -> bool:
        return self.rounds == self.dies

    def meet(self, body: dict) -> Answer:
        told = body["init_info"]
        store = wire.visit(told["host"], told["port"], limit_seconds=10.0)
        place = {"rank": told["rank_offset"], "world_size": told["world_size"]}
        self.groups = wire.join(store, senders=told["senders"], limit_seconds=10.0, **place)
        return 200, {}

    def receive(self, body: dict) -> Answer:
        self.rounds += 1
        if self.is_dead:
            self.groups.clear()
            return 500, {"error": "engine"}
        self.got.update(wire.receive(self.groups, body["update_info"]["parts"]))
        return 200, {}


def send_from_two_ranks(client: Callable[..., VLLMServers], worker: Worker, counts: tuple[int, int]) -> dict[str, torch.Tensor]:
    """As many tensors from each rank, one a bucket; what the worker should have got. Raises what both ranks raise."""
    together = Together()
    parts = [{f"{rank}.{i}": torch.full((5, 7), 10.0 * rank + i) for i in range(count)} for rank, count in enumerate(counts)]
    told = [[TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()] for part in parts]

    def rank(number: int) -> EngineError | None:
        engine = client(worker.server.url, ranks=together.of(number))
        engine.buckets.bucket_bytes = 256
        try:
            engine.update_weights(parts[number].items(), 1, division=Division(told, mine=number))
        except EngineError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(rank, range(2))
    assert type(first) is type(second), (first, second)
    if first is not None:
        raise first
    return parts[0] | parts[1]


@pytest.mark.parametrize("counts", [(3, 1), (1, 3)])
def test_senders_with_unequal_parts_send_at_once_and_all_of_it_arrives(stub, client, counts):
    worker = Worker(stub)
    sent = send_from_two_ranks(client, worker, counts)
    assert worker.rounds == max(counts)
    assert {name: t.tolist() for name, t in worker.got.items()} == {name: t.tolist() for name, t in sent.items()}


def test_a_server_that_dies_while_many_send_is_news_to_each_of_them(stub, client, monkeypatch):
    aborted = []
    monkeypatch.setattr(dist.ProcessGroupGloo, "abort", lambda group: aborted.append(group.rank()))
    with pytest.raises(EngineLost):
        send_from_two_ranks(client, Worker(stub, dies=2), (3, 3))
    assert aborted == [0, 0], "each sender ends its group at once: on a GPU its broadcast would go on"


def test_a_group_over_nccl_has_no_watchdog_that_ends_the_process(monkeypatch):
    def made(*args: object) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    names = ("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
    made.Options = SimpleNamespace
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    monkeypatch.setenv(names[1], "1")
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv(names[0], before)
        found = wire.make_group(dist.HashStore(), sender=0, rank=0, world_size=2, device="cuda", limit_seconds=1.0)
        assert found == {names[0]: "1", names[1]: "1"}
        assert os.environ.get(names[0]) == before, "the trainer's own groups keep theirs"


@pytest.fixture
def ipc(monkeypatch) -> Iterator[Callable[..., Any]]:
    """`ipc(engine)`: the servers' client with vLLM's trainer class, of which is left what ranks and servers say to each other."""

    class Trainer:
        def __init__(self, info: SimpleNamespace, *, client: IpcSender, source: weight_transfer.Bucket) -> None:
            self.info, self.client, self.source = info, client, source

        def send_weights(self) -> None:
            assert all(tensor.nbytes <= self.info.packed_buffer_size_bytes for _, tensor in self.source)
            if self.info.rank == 0:
                self.client.update_weights({"names": [name for name, _ in self.source], "ipc_handles": {}})
            self.client.ranks.together()

        def shutdown(self) -> None: ...

    transfer = "vllm.distributed.weight_transfer"
    factory = SimpleNamespace(WeightTransferTrainerFactory=SimpleNamespace(trainer_init=Trainer))
    monkeypatch.setitem(sys.modules, f"{transfer}.factory", factory)
    monkeypatch.setitem(sys.modules, f"{transfer}.ipc_engine", SimpleNamespace(IPCTrainerInitInfo=SimpleNamespace))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 256)

    def on(engine: VLLMServers) -> VLLMServers:
        engine.sender, engine.buckets.bucket_bytes = IpcSender(engine.servers, ranks=engine.ranks), 256
        return engine

    return on


def test_ipc_s_buffer_holds_the_largest_tensor(stub, client, ipc):
    weights = {"norm": torch.ones(8), "embedding": torch.ones(32, 32)}
    told = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    for sent, size in ((weights, 4096), ({"norm": weights["norm"]}, 256)):
        engine = ipc(client(stub().url))
        engine.update_weights(sent.items(), 1, division=Division([[info for info in told if info.name in sent]], mine=0))
        assert engine.sender.engine.info.packed_buffer_size_bytes == size


def test_a_server_that_dies_while_ranks_share_their_memory_stops_them_at_the_same_bucket(stub, client, ipc):
    def receive(body: dict) -> Answer:
        return (500, {"error": "engine"}) if is_dead() else (200, {})

    def is_dead() -> bool:
        return [path for path, _ in server.asked].count("/update_weights") >= 2

    server, together, walked = stub(update_weights=receive, health=lambda body: (503 if is_dead() else 200, {})), Together(), [0, 0]

    def weights(number: int) -> Iterator[wire.Named]:
        for i in range(5):
            walked[number] += 1
            yield f"{i}", torch.ones(64)

    def rank(number: int) -> None:
        ipc(client(server.url, ranks=together.of(number))).update_weights(
            weights(number), 1, division=Division([()], mine=None if number else 0)
        )

    with ThreadPoolExecutor(2) as ranks:
        for done in [ranks.submit(rank, number) for number in range(2)]:
            with pytest.raises(EngineLost):
                done.result()
    assert walked == [3, 3], "the third tensor ends the second bucket"


def test_user_mistakes_are_named(stub, client):
    with pytest.raises(ValueError, match=r"rollout.urls = \[\]"):
        VLLMServers([])
    with pytest.raises(ValueError, match=r"n = 64 completions: more than rollout\.max_num_seqs = 8"):
        ask(client(stub().url, max_num_seqs=8), n=64)
    with pytest.raises(ValueError, match=r"sampling.max_tokens = 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="n = 1 for greedy sampling"):
        SamplingParams(max_tokens=1, temperature=0.0, n=2)
    with pytest.raises(ValueError, match="'nccl': needs CUDA"):
        make_sender("nccl", None)
    with pytest.raises(ValueError, match="'smoke': not a backend"):
        make_sender("smoke", None)
    with pytest.raises(ValueError, match="needs a folder"):
        make_sender("file", None)


def test_buckets_keep_order_and_limit():
    weights = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate([64, 64, 100, 500, 10, 10])]
    assert [[name for name, _ in bucket] for bucket in wire.buckets(weights, 192)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert rank_offsets([2, 1, 4]) == [1, 3, 4]


def test_a_bucket_of_any_types_and_shapes_arrives_bit_by_bit():
    bucket = [
        ("odd", torch.arange(7, dtype=torch.bfloat16)),
        ("slice", torch.randn(6, 8)[:, 2:5]),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
        ("empty", torch.zeros(0, 4)),
        ("fp8", torch.arange(5.0).to(torch.float8_e4m3fn)),
    ]
    store = dist.HashStore()

    def rank(r: int) -> dict[str, torch.Tensor]:
        group = dist.ProcessGroupGloo(store, r, 2)
        if r == 0:
            wire.broadcast(group, wire.pack(bucket)).wait()
            return dict(bucket)
        return dict(wire.receive([group], [wire.describe(bucket)]))

    with ThreadPoolExecutor(2) as ranks:
        sent, found = ranks.map(rank, range(2))
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].float().equal(tensor.float())
