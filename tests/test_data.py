"""Data: every source gives the same problems each time, faults are named by file and line, the cursor resumes."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from megatron_r1 import data
from megatron_r1.conversations import Conversations
from megatron_r1.problem import Conversation, Problem

ADDITION = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "operators": ["+"], "allow_parentheses": False}


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_jsonl_problems_keep_order_numbers_and_chosen_keys(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"q": "1+1", "a": 2, "more": []}, "", {"q": "2+2", "a": "4"})
    problems = data.load_problems(jsonl=path, prompt_key="q", answer_key="a")
    assert problems == [Problem(0, "1+1", "2", path), Problem(1, "2+2", "4", path)]
    assert len(data.load_problems(jsonl=path, prompt_key="q", answer_key="a", size=1)) == 1


def test_rows_may_have_a_source_each_and_answers_that_are_objects(tmp_path: Path):
    tests = {"cases": [{"stdin": "1", "stdout": "2"}]}
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "1", "from": "math"}, {"prompt": "b", "answer": tests, "from": "code/x"})
    problems = data.load_problems(jsonl=path, source_key="from")
    assert [p.source for p in problems] == ["math", "code/x"]
    assert json.loads(problems[1].answer) == tests
    assert {p.source for p in data.load_problems(jsonl=path)} == {path}
    with pytest.raises(ValueError, match=r"p.jsonl:1: no 'source' among .* data.source_key"):
        data.load_problems(jsonl=path, source_key="source")


def test_problems_stream_and_a_later_line_is_not_read_before_it_is_needed(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}, "broken")
    stream = data.stream_problems(jsonl=path)
    assert [next(stream).prompt, next(stream).prompt] == ["a", "c"]
    with pytest.raises(ValueError, match=r"p\.jsonl:3"):
        next(stream)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r":2: not JSON .* at column 15"),
        ("[1]", r":2: a JSON list; write one object a line"),
        ('{"prompt": "x"}', r":2: no 'answer' among 'prompt'.* data.answer_key"),
        ('{"prompt": " ", "answer": "1"}', r":2: 'prompt' is ' '"),
        ('{"prompt": ["x"], "answer": "1"}', r":2: 'prompt' is \['x'\]"),
        ('{"prompt": "x", "answer": null}', r":2: 'answer' is None"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"}, line)
    with pytest.raises(ValueError, match=r"p\.jsonl" + message) as error:
        data.load_problems(jsonl=path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"jsonl": "/nowhere.jsonl"}, "/nowhere.jsonl: there is no such file"),
        ({}, "none of jsonl, huggingface, reasoning_gym, humaneval is set"),
        ({"jsonl": "a", "huggingface": "b"}, "jsonl and huggingface of .* set exactly one"),
        ({"jsonl": "a", "humaneval": True}, "jsonl and humaneval of"),
        ({"reasoning_gym": "basic_arithmetc"}, "did you mean 'basic_arithmetic'"),
        ({"reasoning_gym": "basic_arithmetic", "reasoning_gym_options": {"digits": 2}}, "reasoning_gym_options: .*'digits'"),
        ({"reasoning_gym": "basic_arithmetic", "reasoning_gym_options": {"min_terms": 0}}, "min_terms must be positive"),
        ({"reasoning_gym": "basic_arithmetic", "prompt_key": "expresion"}, "no 'expresion' among .*'expression'"),
    ],
)
def test_a_source_that_cannot_be_read_is_a_one_line_error(source: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        data.load_problems(**source)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_an_error(tmp_path: Path):
    path = write(tmp_path / "empty.jsonl", "")
    with pytest.raises(ValueError, match="holds no problems"):
        data.load_problems(jsonl=path)
    with pytest.raises(ValueError, match="holds no conversations"):
        Conversations(path)


def test_hugging_face_data_sets_load_from_disk_and_from_data_files(tmp_path: Path):
    rows = {"prompt": ["1+1", "2+2"], "answer": ["2", "4"]}
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    table.to_parquet(str(tmp_path / "files" / "train.parquet"))
    for folder, split in (("one", "train"), ("dict", "test"), ("files", "train")):
        problems = data.load_problems(huggingface=str(tmp_path / folder), split=split)
        assert [(p.id, p.prompt, p.answer) for p in problems] == [(0, "1+1", "2"), (1, "2+2", "4")]
    with pytest.raises(ValueError, match=r"data.huggingface = .*dict', split 'train'"):
        data.load_problems(huggingface=str(tmp_path / "dict"))


def test_procedural_problems_are_the_same_each_time_and_never_repeat():
    load = {"reasoning_gym": "basic_arithmetic", "reasoning_gym_options": ADDITION, "prompt_key": "expression", "size": 500}
    problems = data.load_problems(**load, seed=3)
    assert problems == data.load_problems(**load, seed=3)
    assert problems[:20] != data.load_problems(**load, seed=4)[:20]
    assert len({p.prompt for p in problems}) == len(problems) > 450
    assert [p.id for p in problems] == list(range(len(problems)))
    assert all(sum(map(int, p.prompt.split(" + "))) == int(p.answer) for p in problems)


def test_conversations_must_end_with_the_assistant_and_have_known_roles(tmp_path: Path):
    good = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path / "c.jsonl", {"messages": good})
    assert list(Conversations(path)) == [Conversation(tuple(good))]
    for messages, message in (
        ([], 'no list of "messages"'),
        (good[:1], "ends with a user message"),
        ([{"role": "robot", "content": ""}], "message 0 is"),
        ([{"role": "user", "content": 3}], "needs a role"),
        (["hi"], "message 0 is 'hi'"),
    ):
        write(tmp_path / "c.jsonl", {"messages": good}, {"messages": messages})
        with pytest.raises(ValueError, match=r"c\.jsonl:2: .*" + message):
            Conversations(path)


def problems(count: int) -> list[Problem]:
    return [Problem(i, str(i), str(i)) for i in range(count)]


def test_the_split_depends_on_the_seed_alone_and_parts_do_not_overlap():
    train, held_out = data.split_held_out(problems(100), 20, seed=1)
    assert (len(train), len(held_out)) == (80, 20)
    assert sorted(p.id for p in train + held_out) == list(range(100))
    assert data.split_held_out(problems(100), 20, seed=1) == (train, held_out)
    assert data.split_held_out(problems(100), 20, seed=2)[1] != held_out
    assert data.split_held_out(problems(5), 0, seed=1)[1] == []
    with pytest.raises(ValueError, match=r"data.held_out = 5: leaves nothing to train on"):
        data.split_held_out(problems(5), 5, seed=1)


def test_each_epoch_visits_every_item_at_most_once_in_a_new_order():
    dataset = data.Dataset(problems(10), seed=1)
    epochs = [[p.id for _ in range(3) for p in dataset.take(3)] for _ in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert dataset.epoch == 2
    with pytest.raises(ValueError, match=r"a batch of 11 .* holds 10"):
        dataset.take(11)


def test_a_saved_cursor_continues_with_the_same_items():
    dataset = data.Dataset(problems(10), seed=1)
    for _ in range(4):
        dataset.take(3)
    state = json.loads(json.dumps(dataset.state_dict()))
    resumed = data.Dataset(problems(10), seed=1)
    resumed.load_state_dict(state)
    assert [resumed.take(3) for _ in range(8)] == [dataset.take(3) for _ in range(8)]
    for other, message in ((data.Dataset(problems(10), seed=2), "seed 1, this data set 2"), (data.Dataset(problems(9), seed=1), "size 10")):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
