"""R1's safety reward (Nature 645, equation 6): the pointwise reward model's score of the whole response, reasoning included."""

from __future__ import annotations

from functools import partial

from megatron_r1.rewards import reward_model

reward = partial(reward_model.reward, scope="response")
