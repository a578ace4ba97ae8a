#!/usr/bin/env python3
"""Renders testdata/templates/*/*.jinja with transformers and writes chat_golden_jinja2.jsonl beside them.

    pip install transformers==5.23.0 jinja2
    scripts/oracle/chat_templates.py testdata/templates

The clock stands at 2025-06-01 12:00 UTC. `cargo test -p kto-formats template` compares ours with the result.
"""

import datetime
import json
import sys
from pathlib import Path

from transformers.utils import chat_template_utils

CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Paris", "n": 1.5, "ok": True, "x": None}},
}
CONVERSATIONS = {
    "single": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}],
    "sys_multi": [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Who are you"},
        {"role": "assistant", "content": "   I am an assistant   "},
        {"role": "user", "content": "Another question"},
    ],
    "prompt_only": [{"role": "user", "content": "What is 2+2?"}],
    "unicode": [
        {"role": "user", "content": "Café — naïve \U0001f999 你好\n<b>\"quotes\"</b> & {{ braces }} {% raw %}"},
        {"role": "assistant", "content": "¡Hola!\r\n\tok"},
    ],
    "reasoning": [
        {"role": "user", "content": "2+2?", "name": None},
        {"role": "assistant", "content": "4", "reasoning": "two and two"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>\nthree\n</think>\n\n6"},
    ],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "tools": [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"temp": 20}'},
        {"role": "assistant", "content": "20 C"},
    ],
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get \"weather\" <now>", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]


class Clock(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2025, 6, 1, 12, 0, 0)


def render(template, context):
    """What apply_chat_template(tokenize=False) does."""
    messages = [{k: v for k, v in m.items() if v is not None} for m in context["messages"]]
    rest = {k: v for k, v in context.items() if k != "messages"}
    texts, _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **rest)
    return texts[0]


def main():
    chat_template_utils.datetime = Clock
    folder = Path(sys.argv[1])
    with open(folder / "chat_golden_jinja2.jsonl", "w", encoding="utf-8") as out:
        for path in sorted(folder.glob("*/*.jinja")):
            template = path.read_bytes().decode("utf-8")
            for case, messages in CONVERSATIONS.items():
                context = {
                    "messages": messages,
                    "add_generation_prompt": case in ("prompt_only", "sys_multi"),
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "tools": TOOLS if case == "tools" else None,
                    "documents": None,
                }
                try:
                    expected, error = render(template, context), None
                except Exception as e:  # whatever Python raises is the expectation
                    expected, error = None, f"{type(e).__name__}: {e}"[:200]
                row = {
                    "source": path.parent.name,
                    "template": path.name,
                    "case": case,
                    "context": context,
                    "expected": expected,
                    "error": error,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
