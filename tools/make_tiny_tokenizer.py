"""Writes the tokenizer of configs/models/tiny_v3: `python tools/make_tiny_tokenizer.py configs/models/tiny_v3`.

Bytes are the tokens, so any text can be written and every digit is one token. Beside them stand the chat's marks, the tags
of R1's reasoning format, and the two operators with their spaces, which keep an arithmetic prompt short.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MARKS = ["<bos>", "<eos>", "<pad>", "<user>", "<assistant>"]  # special: left out of decoded text
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # ordinary: rewards read them in the decoded text
SPACE = "\u0120"  # how byte-level BPE writes a space
MERGES = [(SPACE, "+"), (SPACE, "-"), (f"{SPACE}+", SPACE), (f"{SPACE}-", SPACE)]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '<assistant>' + message.content + eos_token }}"
    "{% elif message.role == 'user' %}{{ '<user>' + message.content }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def main(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    pieces = [*MARKS, *TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    tokenizer.add_tokens(TAGS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
