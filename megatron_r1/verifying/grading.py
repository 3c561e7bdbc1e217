"""One verifier process: reads requests from stdin and answers on stdout, a line of JSON each. Started by scoring.py.

    {"reward": "accuracy", "completion": "...", "problem": {...}, "options": {...}}  ->  {"score": 1.0} or {"failure": "why"}
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import Any

from megatron_r1 import plugins
from megatron_r1.problem import Problem
from megatron_r1.processes import die_with_parent

MEMORY_BYTES = 4 << 30  # a hostile completion (9**9**9) ends in a MemoryError, not in the machine's swap


def main(rewards: list[str]) -> None:
    """Imports the rewards, lets each warm up, says that it is ready, then grades until stdin ends."""
    die_with_parent(signal.SIGKILL)  # a hung verifier must not outlive a killed trainer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    # What a reward prints or reads must not meet the protocol.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in rewards:
        module = plugins.load("rewards", name)
        if hasattr(module, "warm_up"):
            module.warm_up()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        print(json.dumps(grade(json.loads(line))), file=answers, flush=True)


def grade(request: dict[str, Any]) -> dict[str, Any]:
    """The score, or why the verifier failed."""
    reward = plugins.load("rewards", request["reward"]).reward
    try:
        score = float(reward(request["completion"], Problem(**request["problem"]), **request["options"]))
    except Exception as error:  # whatever a verifier raises on untrusted text is counted, and the run goes on
        return {"failure": f"{type(error).__name__}: {error}"[:500]}
    return {"score": score} if math.isfinite(score) else {"failure": f"returned {score}"}


if __name__ == "__main__":
    main(sys.argv[1:])
