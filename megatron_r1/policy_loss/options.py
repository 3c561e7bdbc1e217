"""The options that every algorithm has beside its own clipping; each default is R1's, and what R1 does not have is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

# correction -> the band of its ratio where none is set: TIS and MIS: verl's and slime's, 1 +- 0.001; IcePop: the paper's
CORRECTION_BANDS = {"tis": (0.0, 2.0), "mis_sequence": (0.0, 2.0), "mis_geometric": (0.999, 1.001), "icepop": (0.5, 5.0)}


@dataclass(frozen=True)
class PolicyLossOptions:
    """Raises ValueError, one line, for a value that is none and for an option that has no effect beside the others."""

    kl_coefficient: float = 0.001  # beta; Nature. The KL term is in the loss, not in the reward
    # kl.py has the formulas. "k3": R1. "k3_unbiased": DeepSeek-V3.2 (arXiv 2512.02556). "k1", "k2": Schulman's others.
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3"
    # "token": DeepSeekMath (arXiv 2402.03300), which R1 cites, and R1's text speaks of clipping tokens.
    # "sequence": equations 1 and 2 as printed, ratio and KL of whole outputs.
    # "geometric": GSPO's ratio of whole outputs to the power 1/|o| (arXiv 2507.18071); KL of tokens.
    ratio: Literal["token", "sequence", "geometric"] = "token"
    # "sequence_mean": each output's mean over its tokens, then the mean over outputs (1/G sum_i 1/|o_i| sum_t, DeepSeekMath).
    # "token_mean": the mean over all tokens of the optimizer step (DAPO, arXiv 2503.14476).
    # "constant": each output's sum over constant_tokens, then the mean over outputs (Dr. GRPO, arXiv 2503.20783).
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    constant_tokens: int | None = None  # for "constant"; Dr. GRPO's code takes sampling.max_tokens
    # The paper writes std without saying which: "population" divides by G, "sample" by G - 1 (verl's torch.std).
    # "off": rewards are only centred (Dr. GRPO; DeepSeek-V3.2).
    std: Literal["population", "sample", "off"] = "population"
    std_epsilon: float = 1e-6  # not in the paper; verl's value
    # "trainer": pi_old recomputed by the trainer before the first minibatch. "sampler": the rollout engine's own
    # log-probs, which saves a forward and corrects for the engines' difference (verl's bypass mode).
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    # correction.py has the formulas: what a token's gain is multiplied by because the sampler is not the trainer.
    correction: Literal["none", "tis", "mis_sequence", "mis_geometric", "icepop"] = "none"
    correction_low: float | None = None  # None: CORRECTION_BANDS
    correction_high: float | None = None
    # delta of DeepSeek-V3.2's off-policy sequence masking; the paper does not print it, slime has 1e-4. None: off
    off_policy_delta: float | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} = {value!r}: use one of {', '.join(get_args(hint))}")
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(f"{name} = {value}: use a number that is not negative")
        if (self.aggregation == "constant") != bool(self.constant_tokens):
            raise ValueError(
                f'constant_tokens = {self.constant_tokens}: set it, to sampling.max_tokens, for aggregation = "constant" and only there'
            )
        self._check_correction()

    def _check_correction(self) -> None:
        if self.correction == "none":
            for name in ("correction_low", "correction_high"):
                if getattr(self, name) is not None:
                    raise ValueError(f'{name} = {getattr(self, name)}: has no effect with correction = "none"; choose one or remove it')
            return
        if self.old_logprobs == "sampler":
            raise ValueError(
                f'correction = {self.correction!r}: old_logprobs = "sampler" corrects for the sampler already; use "trainer" or "none"'
            )
        low, high = self.correction_band
        if low > high:
            raise ValueError(f"correction_low = {low}: above correction_high = {high}; swap them")

    @property
    def correction_band(self) -> tuple[float, float]:
        """The lower and upper limit of the correction's ratio."""
        low, high = CORRECTION_BANDS[self.correction]
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )
