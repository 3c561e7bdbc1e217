"""The output of a run that is killed anywhere is the output of one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.rejection.resumable_jsonl import ResumableJsonl

SETTINGS = {"samples": 2, "filters": {"ngram": 10}}


def fill(file: Path, until: int) -> ResumableJsonl:
    """Adds the problems that are missing."""
    output = ResumableJsonl(file, SETTINGS)
    output.begin("model")
    for i in range(output.problems, until):
        output.add(f"source{i % 2}", [{"i": i, "text": "\u679c" * j} for j in range(i % 3)], {"problems": 1, "kept": i % 3})
    output.close()
    return output


@pytest.mark.parametrize("rubbish", ["", '{"i": 4, "te', '{"i": 4, "text": ""}\n', '{"i": 4, "text": ""}\n{"i'])
def test_what_a_killed_run_wrote_beyond_its_progress_is_made_again(tmp_path: Path, rubbish: str):
    whole = fill(tmp_path / "whole.jsonl", 10)
    fill(tmp_path / "killed.jsonl", 4)
    with (tmp_path / "killed.jsonl").open("a") as file:
        file.write(rubbish)
    (tmp_path / "killed.progress.new").write_text('{"problems": 5')
    killed = fill(tmp_path / "killed.jsonl", 10)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert killed.counts == whole.counts == {"source0": {"problems": 5, "kept": 5}, "source1": {"problems": 5, "kept": 4}}


def test_a_file_that_was_begun_otherwise_is_not_continued(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    fill(file, 3)
    with pytest.raises(ValueError, match=r"samples = 4: the run in this folder was begun with 2; set that, or start a new run.dir"):
        ResumableJsonl(file, {**SETTINGS, "samples": 4})
    with pytest.raises(ValueError, match="the servers serve 'other': the run in this folder was begun with 'model'"):
        ResumableJsonl(file, SETTINGS).begin("other")
    file.write_text("")
    with pytest.raises(ValueError, match="has lost some of its"):
        ResumableJsonl(file, SETTINGS)
