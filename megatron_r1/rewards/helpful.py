"""R1's helpfulness reward (Nature 645, equation 5): the pairwise reward model's score of the final summary alone."""

from __future__ import annotations

from functools import partial

from megatron_r1.rewards import reward_model

reward = partial(reward_model.reward, scope="summary")
