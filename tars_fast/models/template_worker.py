"""Renders chat templates, one JSON line in and one out: a process of its own, which `templates` starts and may lose.

Not imported by anything: `templates` runs this file.
"""

from __future__ import annotations

import json
import resource
import signal
import sys


def main(memory_bytes: int, longest: int) -> None:
    # Before the library that runs what strangers wrote.
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    from transformers.utils.chat_template_utils import render_jinja_template

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, object] = {}
        # Its default action ends this process, also within a single long operation of the interpreter.
        signal.alarm(request["seconds"])
        try:
            # A list of prompts in some releases of transformers, (prompts, places of generated text) in others.
            rendered = render_jinja_template(
                [request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["special_tokens"],
            )
            text = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
            if len(text) > longest:
                answer["error"] = f"it makes a prompt of {len(text)} characters, more than {longest}"
            else:
                answer["text"] = text
        except MemoryError:
            answer["error"] = f"it takes more than {memory_bytes / 2**30:g} GB of memory"
        except Exception as error:  # A template may raise anything; the one who asked gets it as text.
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
