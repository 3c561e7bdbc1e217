"""One server whose workers are on two nodes, which are two addresses here: it takes weights and answers as one."""

from __future__ import annotations

import pytest
from servers import checkpoint_weights, logprobs, save, tiny_model

from megatron_r1.config_types import Rollout
from megatron_r1.launch import spanning
from megatron_r1.processes import free_port
from megatron_r1.rollout.server_process import ServerProcess, server_command
from megatron_r1.rollout.vllm_server import VLLMServers

NODES = ("127.0.0.1", "127.0.0.2")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--enable-expert-parallel"]], ids=["TP2", "TP2, EP2"])
def test_a_server_on_two_nodes_has_the_log_probs_of_the_weights_it_was_sent(tmp_path, flags):
    model = tiny_model(1)
    save(model, tmp_path / "model")
    parts, port = [], free_port()
    for rank, node in enumerate(NODES):
        rollout = Rollout(nodes=len(NODES), node_rank=rank, head=NODES[0], tensor_parallel_size=2)
        argv, env = server_command(
            str(tmp_path / "model"),
            port=port,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=16,
            kv_cache_bytes=48 << 20,
            tensor_parallel_size=2,
            extra=["--host", node, *spanning(rollout), *flags],
        )
        parts.append(ServerProcess(argv, env, host=node, port=port, log_file=tmp_path / f"{node}.log"))
    engine = VLLMServers([parts[0].url], max_num_seqs=16)
    try:
        for part in parts:
            part.start()
        parts[0].wait_ready(300.0)
        engine.update_weights(checkpoint_weights(model), 1)
        token_ids = list(range(3, 40))
        assert engine.canary(token_ids, logprobs(model, token_ids), tolerance=1e-4) < 1e-4
        assert parts[1].alive
    finally:
        engine.close()
        for part in parts:
            part.stop()
