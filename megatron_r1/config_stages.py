"""The config of each stage: its sections (config_types.py), and the settings that only it has."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megatron_r1.config_types import (
    Algorithm,
    Batch,
    BenchmarkEvaluation,
    Checkpoint,
    Count,
    Data,
    Evaluation,
    Filters,
    General,
    Judge,
    Kernels,
    Layout,
    Logging,
    Model,
    NonNegative,
    Optimizer,
    Positive,
    Quota,
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
    chat_template: bool | str = True  # the tokenizer's; false: the prompt is the text alone; or a Jinja file (configs/templates)

    @property
    def needs_rollouts(self) -> bool:
        """Whether servers must run beside the trainer."""
        return self.evaluation.problems > 0

    @property
    def serves_own_weights(self) -> bool:
        """Whether the servers load the folder's weights, as no trainer sends them any."""
        return False

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest completion that servers are asked for."""
        return max(self.longest_sampled, self.evaluation.max_tokens or 0)

    @property
    def longest_sampled(self) -> int:
        """Tokens of the longest completion outside of evaluation."""
        return max([self.sampling.max_tokens, *(tokens for _, tokens in self.sampling.max_tokens_schedule)])

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
    general: General = General()
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
        shortest = min([self.sampling.max_tokens, *(tokens for _, tokens in self.sampling.max_tokens_schedule)])
        if b.overlong_tokens > shortest:
            raise ValueError(f"batch.overlong_tokens = {b.overlong_tokens}: more than sampling.max_tokens = {shortest}; lower it")
        steps = b.minibatches * b.inner_epochs
        if self.reference_refresh_steps % steps:
            raise ValueError(
                f"reference_refresh_steps = {self.reference_refresh_steps}: must be a multiple of the {steps} optimizer steps of a rollout"
            )
        return self


class ServedConfig(StageConfig):
    """A stage in which no trainer takes part: servers of a model as it is do the work."""

    @property
    def needs_rollouts(self) -> bool:
        return True

    @property
    def serves_own_weights(self) -> bool:
        return True

    @model_validator(mode="after")
    def _no_ranks(self) -> ServedConfig:
        ranks = self.parallel.world_size
        if ranks != 1:
            raise ValueError(f"parallel.world_size = {ranks}: this stage has no trainer ranks; leave it out, and raise rollout.servers")
        return self


class EvalConfig(ServedConfig):
    """A model as it is, on the held-out problems of [data], or on all of them where none are held out."""

    evaluation: BenchmarkEvaluation = BenchmarkEvaluation()

    @property
    def longest_completion(self) -> int:
        return self.evaluation.max_tokens or self.sampling.max_tokens

    @model_validator(mode="after")
    def _has_weights(self) -> EvalConfig:
        if self.model.init == "random":
            raise ValueError('model.init = "random": there is nothing to evaluate; give a folder with weights')
        return self


class RejectionConfig(ServedConfig):
    """Sampling is `sampling`'s (R1 publishes neither temperature nor samples; its cold start samples at 1.0); with `rollout.urls`
    the sampler is any OpenAI-compatible server, as a teacher's, and `model` is not read."""

    model: Model | None = None
    served_model: str = ""  # of those that rollout.urls serve; "" = the only one
    api_key_env: str = ""  # the environment variable that holds the servers' key; "" = they need none
    samples: Count = 16  # completions a problem; R1's is not published
    required: dict[str, float] = {"accuracy": 1.0}  # reward -> the least score of a completion that is kept
    in_flight: Count = 256  # requests at a time
    window: Count = 256  # problems sampled ahead of the first that is not finished: the output keeps their order
    filters: Filters = Filters()
    quota: Quota = Quota()
    judge: Judge = Judge()

    @model_validator(mode="after")
    def _parts_fit(self) -> RejectionConfig:
        if self.model is None and not self.rollout.urls:
            raise ValueError("model.path: required where rollout.urls is empty; give the model to sample from, or servers' addresses")
        if bool(self.judge.url) != bool(self.judge.sources):
            raise ValueError(f"judge.url = {self.judge.url!r}, judge.sources = {self.judge.sources}: set both or neither")
        given = {name for weights in (self.rewards.weights, *self.rewards.by_source.values()) for name in weights}
        for name in self.required:
            if name not in given:
                raise ValueError(f"required.{name}: rewards.weights has no {name!r}; give it a weight, 0.0 will do")
        return self


class RewardModelOptimizer(Optimizer):
    lr: Positive = 6e-6


class RewardModelConfig(StageConfig):
    """Defaults are those of both of R1's reward models (Nature 645, 633; Methods)."""

    kind: Literal["pairwise", "pointwise"]  # pairwise: helpful, the final summary; pointwise: safety, the whole response
    preferences: str  # a file of {"prompt", "chosen", "rejected"} lines, or of {"prompt", "response", "label"} lines
    optimizer: RewardModelOptimizer = RewardModelOptimizer()
    epochs: Count = 1
    batch_size: Count = 256  # pairs or responses an optimizer step
    max_length: Count = 8192  # tokens of prompt and answer; longer examples are left out, for a cut one has no end to score
    chunk_tokens: Count = 32_768

    @property
    def needs_rollouts(self) -> bool:
        return False

    @model_validator(mode="after")
    def _examples_fit(self) -> RewardModelConfig:
        longest = self.max_length * (2 if self.kind == "pairwise" else 1)
        if self.chunk_tokens < longest:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}: an example has up to {longest} tokens; raise it, or lower max_length")
        if self.evaluation.problems:
            raise ValueError(
                f"evaluation.problems = {self.evaluation.problems}: a reward model answers none; "
                "leave it 0 and set data.held_out, on which it is evaluated"
            )
        if not self.chat_template:
            raise ValueError("chat_template = false: the server of a reward model renders messages with its chat template; leave it true")
        return self


class PipelineConfig(Section):
    """Stages one after the other (stages/pipeline.py has their graph); paths are as seen from where the command runs."""

    dir: str  # each stage's folder is in it
    seed: NonNegative = 1  # of every stage
    base_model: str  # the base model's Hugging Face folder
    student: str = ""  # the model that the distillation trains
    problems: str = ""  # the data.jsonl of every stage; "" = their configs name it
    cold_start: str = ""  # the conversations of the first SFT; "" = its config names them
    stages: dict[str, str]  # name of the graph -> its config; those that are not here are left out
    evaluation: str = ""  # a config of `eval`, run on the base model and on what each stage makes; "" = no evaluation
    job: dict[str, str] = {}  # stage or command -> settings of its Slurm job, as "NODES=66 TRAIN_NODES=64" (slurm/pipeline.sh)
    first: str = ""  # begin with this stage; "" = the first
    last: str = ""  # end with this one; "" = the last


STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "eval": EvalConfig,
    "reject": RejectionConfig,
    "reward-model": RewardModelConfig,
}
CONFIGS: dict[str, type[Section]] = {**STAGES, "pipeline": PipelineConfig}
