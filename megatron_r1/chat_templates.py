"""What the config's `chat_template` means; chat.py and the servers' command line must agree on it. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

# No chat: the text alone, and an answer ends with the end token.
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def chat_template(setting: bool | str) -> str | None:
    """The template's Jinja text; None for the tokenizer's own. Raises ValueError for a file that is not there."""
    if isinstance(setting, bool):
        return None if setting else PLAIN
    if not Path(setting).is_file():
        raise ValueError(f"chat_template = {setting!r}: no such file; give a Jinja file, as configs/templates/r1.jinja, or true or false")
    return Path(setting).read_text(encoding="utf-8")


def server_flags(setting: bool | str) -> list[str]:
    """The flags by which `vllm serve` renders chats with it."""
    if setting is True:
        return []
    return ["--chat-template", PLAIN if setting is False else setting]
