"""The config of each stage: its sections (config_types.py), and the settings that only it has."""

from __future__ import annotations

from pydantic import model_validator

from megatron_r1.config_types import (
    Algorithm,
    Batch,
    BenchmarkEvaluation,
    Checkpoint,
    Count,
    Data,
    Evaluation,
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

    @property
    def serves_own_weights(self) -> bool:
        """Whether the servers load the folder's weights, as no trainer sends them any."""
        return False

    @model_validator(mode="after")
    def _pass_at_fits(self) -> StageConfig:
        for k in self.evaluation.pass_at:
            if k > self.evaluation.samples:
                raise ValueError(f"evaluation.pass_at has {k}: more than evaluation.samples = {self.evaluation.samples}; raise it")
        return self


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
    """A model as it is, on the held-out problems of [data], or on all of them where none are held out. No trainer takes part."""

    evaluation: BenchmarkEvaluation = BenchmarkEvaluation()

    @property
    def needs_rollouts(self) -> bool:
        return True

    @property
    def serves_own_weights(self) -> bool:
        return True

    @model_validator(mode="after")
    def _servers_do_the_work(self) -> EvalConfig:
        ranks = self.parallel.world_size
        if ranks != 1:
            raise ValueError(f"parallel.world_size = {ranks}: evaluation has no ranks; leave it out, and raise rollout.servers")
        if self.model.init == "random":
            raise ValueError('model.init = "random": there is nothing to evaluate; give a folder with weights')
        return self


STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "grpo": GRPOConfig, "eval": EvalConfig}
