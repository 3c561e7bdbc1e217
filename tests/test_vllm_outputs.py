"""What is held back in vllm's engine leaves it whole and in order, and in time for whoever reads it earlier.

The functions that make outputs run in a process of their own, for pytest's never imports vLLM.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

Packet = tuple[int, list[int], list[float] | None]  # the step at which it leaves, tokens, log-probs


def departures(steps: int, *, detokenize: bool = False, streamed: bool = False, with_logprobs: bool = True) -> list[Packet]:
    """One request's packets. Its token and log-prob at step i are i and -i; the first output tells of the prompt as well."""
    import numpy as np
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as Params
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import LogprobsLists

    from megatron_r1.rollout.vllm_outputs import Held

    kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
    running = {"a": SimpleNamespace(sampling_params=Params(detokenize=detokenize, output_kind=kind))}
    held, found = Held(), []
    for i in range(steps):
        arrays = (np.array([[i]]), np.array([[-float(i)]]), np.array([1]))
        output = EngineCoreOutput("a", [i], new_logprobs=LogprobsLists(*arrays) if with_logprobs else None)
        if i == 0:
            output.prefill_stats = object()
        if i == steps - 1:
            output.finish_reason = FinishReason.STOP
            running.clear()
        for packet in held.due(0, [output], running):
            logprobs = packet.new_logprobs.logprobs[:, 0].tolist() if packet.new_logprobs else None
            found.append((i, packet.new_token_ids, logprobs))
    assert not held.parts, f"{held.parts=}"
    return found


def test_the_first_token_leaves_at_once_then_packets_then_the_rest_with_the_end(in_engine):
    found = in_engine(departures, 70)
    assert [at for at, _, _ in found] == [0, 32, 64, 69]
    assert [token for _, tokens, _ in found for token in tokens] == list(range(70))
    assert [logprob for _, _, logprobs in found for logprob in logprobs] == [-float(i) for i in range(70)]


def test_a_request_without_logprobs_has_none(in_engine):
    assert in_engine(departures, 5, with_logprobs=False) == [(0, [0], None), (4, [1, 2, 3, 4], None)]


@pytest.mark.parametrize("reader", ["detokenize", "streamed"])
def test_what_somebody_reads_on_the_way_is_not_held(in_engine, reader):
    assert [at for at, _, _ in in_engine(departures, 5, **{reader: True})] == [0, 1, 2, 3, 4]


def new_weights() -> tuple[list, list, str]:
    """An engine with two tokens of a request held and one of an aborted one: what a new version of the weights and a step send."""
    from queue import SimpleQueue

    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as Params
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc

    from megatron_r1.rollout import vllm_outputs

    vllm_outputs.install()
    vllm_outputs.install()
    core = object.__new__(EngineCoreProc)
    request = SimpleNamespace(sampling_params=Params(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY))
    core.scheduler = SimpleNamespace(requests={"a": request, "gone": request})
    core.output_queue, core._weight_version = SimpleQueue(), "1"

    def step(*outputs: EngineCoreOutput) -> list:
        made = {3: EngineCoreOutputs(outputs=list(outputs))}
        core._attach_weight_version(made)
        return [(client, o.request_id, o.new_token_ids, m.weight_version) for client, m in made.items() for o in m.outputs] or made

    assert step(EngineCoreOutput("a", [10]), EngineCoreOutput("gone", [99])) == {}, "no message"
    del core.scheduler.requests["gone"]
    assert step(EngineCoreOutput("a", [11])) == {}
    core.set_weight_version("2")
    client, sent = core.output_queue.get_nowait()
    assert core.output_queue.empty()
    assert step(EngineCoreOutput("a", [12])) == {}
    del core.scheduler.requests["a"]
    sent = [(client, o.request_id, o.new_token_ids, sent.weight_version) for o in sent.outputs]
    return sent, step(EngineCoreOutput("a", [13])), core._weight_version


def test_new_weights_find_nothing_of_the_old_ones_held_and_nothing_of_an_aborted_request(in_engine):
    sent, last, version = in_engine(new_weights)
    assert sent == [(3, "a", [10, 11], "1")]
    assert last == [(3, "a", [12, 13], "2")]
    assert version == "2"
