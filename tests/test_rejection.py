"""Rejection sampling as a user starts it: what is kept, why the rest is not, and the same file however often it is killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from chats import Answer, ChatStub, said
from commands import Command
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1 import config as configuration
from megatron_r1 import data
from megatron_r1.__main__ import main as command
from megatron_r1.chat import Chat
from megatron_r1.config_stages import RejectionConfig
from megatron_r1.conversations import Conversations
from megatron_r1.problem import Problem
from megatron_r1.stages import rejection

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"
R1 = str(ROOT / "configs" / "templates" / "r1.jinja")
GOOD = "<think>\nAdd the two numbers, one after the other, with care.\n</think>\n\n<answer>{}</answer>"
LIMIT = 300.0

CONFIG = """
samples = 4
in_flight = 8
window = 3
[run]
dir = "{root}/run"
[data]
jsonl = "{root}/sums.jsonl"
[rollout]
urls = ["{url}"]
request_timeout_seconds = 20.0
start_timeout_seconds = 20.0
[sampling]
max_tokens = 64
temperature = 0.8
[rewards]
weights = {{ accuracy = 1.0, format = 0.0 }}
[logging]
tensorboard = false
"""


class Site:
    """A config, its problems a+b, and the servers it names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stubs: list[ChatStub] = []

    def serve(self, chat: Callable[[str, dict], Answer]) -> ChatStub:
        self.stubs.append(ChatStub(chat))
        return self.stubs[-1]

    def config(self, url: str, *overrides: str, problems: int = 6) -> RejectionConfig:
        rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(problems)]
        (self.root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.root / "reject.toml").write_text(CONFIG.format(root=self.root, url=url))
        return configuration.load("reject", self.root / "reject.toml", overrides)

    def output(self, run: str = "run") -> bytes:
        return (self.root / run / rejection.OUTPUT).read_bytes()

    def lines(self, run: str = "run") -> list[dict]:
        return [json.loads(line) for line in self.output(run).splitlines()]

    def counts(self, run: str = "run") -> dict[str, dict[str, int]]:
        found = json.loads((self.root / run / "conversations.progress.json").read_text())["counts"]
        return {source: {name: count for name, count in counts.items() if count} for source, counts in found.items()}

    def all(self, run: str = "run") -> dict[str, int]:
        [counts] = self.counts(run).values()
        return counts


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for stub in made.stubs:
        stub.close()


def number(text: str) -> int:
    """The i of "What is i + i?"."""
    return int(text.split()[2])


def random_sums(text: str, body: dict) -> Answer:
    """Right, wrong, cut off or badly written, as the seed says; problems that end in 3 are too long for it."""
    i, draw = number(text), random.Random(f"{text} {body['seed']}")
    if i % 10 == 3:
        return 400, {"error": {"message": "too long"}}
    time.sleep(draw.random() / 100)
    fate = draw.choice(("right", "right", "wrong", "cut", "code"))
    if fate == "cut":
        return said("<think>\nhm", tokens=64, finish_reason="length")
    note = "```" if fate == "code" else f"Note {draw.random()}."
    return said(GOOD.format(2 * i + (fate == "wrong")).replace("care.", f"care. {note}"), tokens=10)


def test_what_is_correct_and_readable_is_kept_with_where_it_comes_from(site: Site):
    def chat(text: str, body: dict) -> Answer:
        seeds.setdefault(text, []).append(body["seed"])
        replies = [GOOD.format(2 * number(text)), GOOD.format(7), "<think>\n```x```\n</think>\n\n" + GOOD.format(2 * number(text))[-30:]]
        return said(replies[len(seeds[text]) % 3], tokens=11)

    seeds: dict[str, list[int]] = {}
    stub = site.serve(chat)
    rejection.main(site.config(stub.url, "in_flight=1"))
    lines = site.lines()
    assert [line["problem_id"] for line in lines] == sorted(line["problem_id"] for line in lines) == [0, 1, 2, 3, 4, 5]
    first = lines[1]
    assert first["messages"] == [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": GOOD.format(2)}]
    assert (first["prompt"], first["answer"], first["source"]) == ("What is 1 + 1?", "2", f"{site.root}/sums.jsonl")
    assert first["rewards"] == {"accuracy": 1.0, "format": 1.0}
    seed = first["sampler"].pop("seed")
    assert first["sampler"] == {"model": "org/teacher", "temperature": 0.8, "top_p": 1.0, "sample": 2}
    assert seed in seeds["What is 1 + 1?"]
    assert len({seed for used in seeds.values() for seed in used}) == 24
    assert site.all() == {"problems": 6, "solved": 6, "samples": 24, "kept": 6, "kept_tokens": 66, "wrong": 12, "code_block": 6}
    conversations = Conversations(str(site.root / "run" / rejection.OUTPUT))
    assert [list(c.messages) for c in conversations] == [line["messages"] for line in lines]
    assert (site.root / "run" / "done").read_text() == "6\n"


def test_a_student_with_another_tokenizer_learns_what_its_teacher_wrote(site: Site):
    """Text goes in and out: the teacher parts its reasoning, the student's template is R1's, and its tokens are its own."""
    sums = "Sum: 1 + 1 = 2, \u6240\u4ee5 2."
    teacher = site.serve(lambda text, body: said("The answer is \\boxed{2}.", reasoning_content=sums))
    rejection.main(site.config(teacher.url, "filters.min_language_share=0.2", problems=2))
    [conversation] = Conversations(str(site.root / "run" / rejection.OUTPUT))
    student = Chat(TINY, chat_template=R1)
    sequence = student.sequence(conversation)
    learned = [i for i, mask in zip(sequence.ids, sequence.learned, strict=True) if mask]
    assert student.tokenizer.decode(learned) == f"{sums}\n</think>\n\nThe answer is \\boxed{{2}}.<eos>"
    assert site.lines()[0]["sampler"]["model"] == "org/teacher"


def test_every_sample_is_accounted_for_and_the_statistics_are_metrics_and_a_table(site: Site, capsys: pytest.CaptureFixture[str]):
    rejection.main(site.config(site.serve(random_sums).url, problems=25))
    counts = site.all()
    assert counts["samples"] == 100 == sum(counts.get(name, 0) for name in ("kept", *rejection.REASONS))
    assert counts["refused"] == 12  # problems 3, 13 and 23
    assert min(counts[name] for name in ("kept", "wrong", "truncated", "code_block")) > 5
    assert len(site.lines()) == counts["kept"]
    last = [json.loads(line) for line in (site.root / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    source = f"{site.root}/sums.jsonl".strip("/")
    assert last["step"] == 25
    assert 0.0 < last["cost/gpu_hours"] < 0.1
    for name in ("kept", "wrong", "truncated", "refused"):
        assert last[f"reject/{name}"] == last[f"reject/{source}/{name}"] == counts[name]
    assert "rejection sampling" in capsys.readouterr().out


def test_a_repeated_completion_and_what_is_over_the_quotas_are_dropped(site: Site):
    def chat(text: str, body: dict) -> Answer:
        right = GOOD.format(2 * number(text))
        return said(right if number(text) % 2 else right.replace("care.", f"care {body['seed']}."))

    rejection.main(site.config(site.serve(chat).url, "quota.per_problem=2", "quota.per_source=6"))
    assert [line["problem_id"] for line in site.lines()] == [0, 0, 1, 2, 2, 3]
    expected = {"problems": 6, "solved": 4, "samples": 16, "kept": 6, "kept_tokens": 42, "problem_quota": 4, "duplicate": 6, "skipped": 2}
    assert site.all() == expected


def test_a_judge_decides_where_rules_cannot_and_what_it_does_not_say_is_not_kept(site: Site):
    def judging(text: str, body: dict) -> Answer:
        i = number(text.partition("<question>\n")[2])
        assert "<think>" not in text, "the judge must not see the reasoning"
        return said({0: '{"verdict": "correct"}', 1: '{"verdict": "incorrect"}', 2: "I like it."}[i])

    teacher = site.serve(lambda text, body: said(GOOD.format(f"about {2 * number(text)}").replace("care.", f"care {body['seed']}.")))
    judge = site.serve(judging)
    rejection.main(site.config(teacher.url, f"judge.url={judge.url}", 'judge.sources=["*sums*"]', "judge.tries=2", problems=3))
    lines = site.lines()
    assert [(line["problem_id"], line["judged"], line["rewards"]) for line in lines] == [(0, True, {})] * 4
    counts = site.all()
    assert {name: counts[name] for name in ("kept", "judged_wrong", "judge_failed", "judge_unread")} == {
        "kept": 4,
        "judged_wrong": 4,
        "judge_failed": 4,
        "judge_unread": 8,
    }
    assert len(judge.asked) == 4 + 4 + 8


def test_a_verifier_that_fails_keeps_nothing_and_is_counted(site: Site, monkeypatch: pytest.MonkeyPatch):
    (site.root / "mine").mkdir()
    (site.root / "mine" / "fails.py").write_text("def reward(completion, problem):\n    raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(site.root))
    monkeypatch.setenv("PYTHONPATH", str(site.root))
    teacher = site.serve(lambda text, body: said(GOOD.format(2 * number(text))))
    config = site.config(teacher.url, 'rewards.weights={"mine.fails" = 1.0}', 'required={"mine.fails" = 1.0}', problems=1)
    with pytest.raises(ValueError, match="nothing was kept of 1 problems; see the table"):
        rejection.main(config)
    assert site.all() == {"problems": 1, "samples": 4, "verifier_failed": 4}
    assert not (site.root / "run" / "done").exists()


def test_problems_that_are_held_out_are_not_sampled(site: Site):
    stub = site.serve(lambda text, body: said(GOOD.format(2 * number(text))))
    config = site.config(stub.url, "data.held_out=2")
    rejection.main(config)
    train, held_out = data.split_held_out(data.load_problems(jsonl=config.data.jsonl), 2, seed=config.run.seed)
    assert {body["messages"][0]["content"] for body in stub.asked} == {problem.prompt for problem in train}
    assert len(held_out) == 2


def test_at_most_a_window_of_problems_is_under_way_and_the_order_is_theirs():
    problems = [Problem(i, str(i), "") for i in range(20)]
    futures: dict[int, Future] = {}
    taken: list[int] = []
    order = random.Random(1)

    def start(problem: Problem) -> Future:
        futures[problem.id] = Future()
        open_ones = [i for i in futures if i not in taken]
        assert len(open_ones) <= 4, open_ones
        for i in order.sample(open_ones, len(open_ones)):
            if not futures[i].done() and len(open_ones) == 4:
                futures[i].set_result(i * i)
        return futures[problem.id]

    def last_ones() -> bool:
        for future in futures.values():
            if not future.done():
                future.set_result(-1)
        return False

    for problem, result in rejection.in_order(iter(problems), start, window=4, stop=last_ones):
        taken.append(problem.id)
        assert result in (problem.id**2, -1)
    assert taken == list(range(20))
    assert list(rejection.in_order(iter(problems), start=lambda p: Future(), window=4, stop=lambda: True)) == []


def test_a_run_that_is_done_asks_no_server_and_one_with_other_settings_is_refused(site: Site):
    stub = site.serve(random_sums)
    rejection.main(site.config(stub.url))
    before, asked = site.output(), len(stub.asked)
    rejection.main(site.config("http://127.0.0.1:1"))
    assert (site.output(), len(stub.asked)) == (before, asked)
    with pytest.raises(ValueError, match="samples = 5: the run in this folder was begun with 4"):
        rejection.main(site.config(stub.url, "samples=5"))


def stage(site: Site, run: str) -> Command:
    """The stage's process, as the launcher starts it."""
    return Command("reject", site.root / "reject.toml", f"run.dir={site.root}/{run}", RANK="0", WORLD_SIZE="1")


def wait_for_problems(site: Site, run: str, count: int) -> None:
    file, until = site.root / run / "conversations.progress.json", time.monotonic() + LIMIT
    while not file.is_file() or json.loads(file.read_text())["problems"] < count:
        assert time.monotonic() < until, f"{count=} problems were not reached"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_with_the_same_bytes_and_the_same_counts(site: Site):
    stub = site.serve(random_sums)
    config = site.config(stub.url, "quota.per_source=90", problems=80)
    rejection.main(config)
    (site.root / "reject.toml").write_text(configuration.dump(config))
    for at, how in ((2, signal.SIGKILL), (25, signal.SIGTERM), (50, signal.SIGKILL)):
        process = stage(site, "killed")
        wait_for_problems(site, "killed", at)
        process.send_signal(how)
        code, out = process.wait(LIMIT)
        assert code == (0 if how == signal.SIGTERM else -how), out
        assert how != signal.SIGTERM or "start the same command again to go on" in out
        assert not (site.root / "killed" / "done").exists()
        with (site.root / "killed" / rejection.OUTPUT).open("a") as file:
            file.write('{"messages": [{"role": "us')
    code, out = stage(site, "killed").wait(LIMIT)
    assert code == 0, out
    assert site.output("killed") == site.output()
    assert site.counts("killed") == site.counts()
    assert site.all()["kept"] == 90
    assert site.all()["skipped"] > 5


MISTAKES = {
    "rollout.urls=[]": ("model.path", "required where rollout.urls is empty"),
    "judge.url=http://127.0.0.1:1": ("judge.url", "judge.sources", "set both"),
    "required.speed=1.0": ("required.speed", "rewards.weights has no 'speed'"),
    "parallel.world_size=2": ("parallel.world_size = 2", "no trainer ranks"),
    "chat_template=false": ("chat_template = False", "rollout.urls apply their own"),
    "api_key_env=NO_SUCH_KEY": ("api_key_env = 'NO_SUCH_KEY'", "export it"),
    "filters.ngrams=3": ("filters.ngrams", "did you mean 'ngram'"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_that_says_what_to_do(site: Site, override: str, capsys: pytest.CaptureFixture[str]):
    site.config("http://127.0.0.1:1")
    assert command(["reject", str(site.root / "reject.toml"), override]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    for words in MISTAKES[override]:
        assert words in line


def talkative(folder: Path) -> Path:
    """A tiny V3 with random weights that ends what it says, sooner or later."""
    torch.manual_seed(2)  # four in five of its likeliest completions end within 40 tokens
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(TINY))).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(0.0, 0.1)
        model.lm_head.weight[model.config.eos_token_id] *= 3
    model.save_pretrained(folder)
    for file in TINY.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    return folder


def likeliest(folder: Path, prompts: list[list[int]], *, tokens: int) -> list[list[int]]:
    """What transformers says after each prompt, without the end token."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    longest, end = max(map(len, prompts)), model.config.eos_token_id
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts = model.generate(ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, pad_token_id=end)[:, longest:].tolist()
    return [text[: text.index(end)] if end in text else text for text in texts]


@pytest.mark.slow
def test_a_real_server_samples_from_the_folders_own_weights_with_the_named_template(site: Site):
    folder = talkative(site.root / "model")
    overrides = [
        "rollout.urls=[]",
        f"model.path={folder}",
        f"chat_template={R1}",
        "rollout.start_timeout_seconds=300.0",
        "rollout.max_prompt_tokens=64",
        "rollout.kv_cache_mib=64",
        "rollout.max_num_seqs=8",
        "sampling.temperature=1e-5",
        "samples=1",
        "required={}",
        "filters.needs_reasoning=false",
        "filters.min_language_share=0.0",
        "filters.max_repeated_ngrams=1.0",
    ]
    site.config("http://unused:1", problems=12)
    assert command(["reject", str(site.root / "reject.toml"), *overrides]) == 0
    chat = Chat(folder, chat_template=R1)
    lines = site.lines()
    assert len(lines) > 2, site.all()
    same = 0
    prompts = [chat.prompt_ids(Problem(0, line["prompt"], "")) for line in lines]
    for line, expected in zip(lines, likeliest(folder, prompts, tokens=64), strict=True):
        text = chat.tokenizer.decode(expected, skip_special_tokens=True).strip()
        same += line["messages"][1]["content"] == text and line["tokens"] == len(expected) + 1
        assert line["sampler"]["model"] == str(folder)
    assert same >= 3, "near-ties of the router part many of so random a model; other weights or another template would part all"
