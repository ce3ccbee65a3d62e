"""Renders a chat template in a process with little time and memory, since a template is a program that may never end.

The script imports jinja2 alone, so it starts in a tenth of a second. It reads [template, seconds] as JSON from stdin.
The environment has what transformers' has; a test compares the two.
"""

import json
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

CPU_SECONDS = 2  # twenty times what the longest templates in use take, Python's start included
WALL_SECONDS = 120  # for a machine that is busy with other things
MEMORY_BYTES = 1 << 30
MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_GROWTH = 1 << 20  # characters that a template may add to what it is given
ENDED, STARTED = "ended", "started"
# Turns (first letters of the roles) and characters of a turn's text. Some templates act on what they are given.
LENGTHS = range(1, 25)
DIALOGUES = tuple(start + ("ua" * length)[:length] for length in LENGTHS for start in ("", "s"))
LONG = ("u", "sua", "uauaua")
SHORT_CHARACTERS, LONG_CHARACTERS = 8, 5000
ROLES = {"s": "system", "u": "user", "a": "assistant"}


@lru_cache(maxsize=64)
def cost_fault(chat_template: str) -> str | None:
    """Why a template must not be rendered in this process: it takes too long, too much memory, or writes too much.

    None if it is cheap, if it raises, or if no process could be started to try it.
    """
    if len(chat_template) > MAX_TEMPLATE_CHARACTERS:
        return f"it has {len(chat_template)} characters"
    command = [sys.executable, "-I", __file__, *sys.path]
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    try:
        said, _ = child.communicate(json.dumps([chat_template, CPU_SECONDS]).encode(), timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it was not rendered within {WALL_SECONDS} s"
    finally:
        child.kill()
        child.wait()
    lines = said.decode(errors="replace").split("\n")
    if lines[0] != STARTED:  # no jinja2 there, no memory: that says nothing about the template
        return None
    if lines[1] == ENDED:
        return None
    return lines[1] or f"rendering a short dialogue took more than {CPU_SECONDS} s, or ended the process that tried it"


def environment():
    """As `transformers.utils.chat_template_utils` makes it."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _render_all(chat_template: str) -> str:
    """What was wrong, or ENDED."""
    try:
        template = environment().from_string(chat_template)
    except (MemoryError, RecursionError) as error:
        return f"it can't be compiled ({type(error).__name__})"
    except Exception:  # a fault that the caller will meet as well, quickly
        return ENDED
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"}
    trials = [(roles, SHORT_CHARACTERS) for roles in DIALOGUES] + [(roles, LONG_CHARACTERS) for roles in LONG]
    for roles, characters in trials:
        messages = [{"role": ROLES[role], "content": "x" * characters} for role in roles]
        for prompt in (False, True):
            values = {"messages": messages, "add_generation_prompt": prompt, "enable_thinking": prompt}
            try:
                text = template.render(**tokens, **values, tools=None, documents=None)
            except (MemoryError, RecursionError) as error:
                return f"rendering a short dialogue ends with {type(error).__name__}"
            except Exception:
                continue
            if len(text) > MAX_GROWTH + 2 * characters * len(roles):
                return f"it makes {len(text)} characters of a dialogue of {characters * len(roles)}"
    return ENDED


def _serve() -> None:
    sys.path[:] = sys.argv[1:]
    with suppress(ImportError):
        environment()
        print(STARTED, flush=True)
    template, cpu_seconds = json.load(sys.stdin)
    for limit, most in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, MEMORY_BYTES)):
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, (most, most))
    print(_render_all(template), flush=True)


if __name__ == "__main__":
    _serve()
