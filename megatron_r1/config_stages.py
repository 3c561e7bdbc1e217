"""The config of each stage: its sections (config_types.py), and the settings that only it has."""

from __future__ import annotations

from pydantic import model_validator

from megatron_r1.config_types import (
    Algorithm,
    Batch,
    Checkpoint,
    Count,
    Data,
    Evaluation,
    Kernels,
    Layout,
    Logging,
    Model,
    NonNegative,
    Optimizer,
    Rewards,
    Rollout,
    Run,
    Sampling,
    Section,
)


class StageConfig(Section):
    """What every training stage has."""

    run: Run = Run()
    model: Model
    kernels: Kernels = Kernels()
    parallel: Layout = Layout()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    rollout: Rollout = Rollout()
    sampling: Sampling = Sampling()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    chat_template: bool = True  # false: the prompt is the text alone

    @property
    def needs_rollouts(self) -> bool:
        """Whether servers must run beside the trainer."""
        return self.evaluation.problems > 0


class SFTConfig(StageConfig):
    steps: Count  # optimizer steps
    batch_size: Count = 128  # conversations an optimizer step (R1: 128)
    chunk_tokens: Count = 32_768


class GRPOConfig(StageConfig):
    steps: Count = 10_400  # optimizer steps; R1-Zero's
    batch: Batch = Batch()
    algorithm: Algorithm = Algorithm()
    reference_refresh_steps: NonNegative = 400  # reference <- policy every so many optimizer steps; 0 = never

    @property
    def needs_rollouts(self) -> bool:
        return True

    @model_validator(mode="after")
    def _batch_sizes_fit(self) -> GRPOConfig:
        b = self.batch
        outputs = b.problems * b.completions
        if outputs % b.minibatches:
            raise ValueError(
                f"batch.minibatches = {b.minibatches}: must divide the {outputs} outputs of a rollout (problems x completions)"
            )
        if b.completions < 2:
            raise ValueError("batch.completions = 1: a group of one has no advantage; use 2 or more (R1: 16)")
        steps = b.minibatches * b.inner_epochs
        for name, value in (("steps", self.steps), ("reference_refresh_steps", self.reference_refresh_steps)):
            if value % steps:
                raise ValueError(f"{name} = {value}: must be a multiple of the {steps} optimizer steps of a rollout")
        return self


class EvalConfig(StageConfig):
    pass


STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "grpo": GRPOConfig, "eval": EvalConfig}
