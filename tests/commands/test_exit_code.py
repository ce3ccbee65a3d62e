"""The exit code of a process that a user interrupts, and interrupts again while it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwhisper.commands.exit_code import INTERRUPTED

ROOT = Path(__file__).parents[2]

# `qwhisper train` whose work is to be interrupted. It writes a line after Python has dropped its signal handlers, and
# ends once its stdin is closed.
PROCESS = """
import os, runpy, signal, sys
from qwhisper import cli

class Last:
    def __del__(self, write=os.write, read=os.read):
        write(1, b"ending\\n")
        read(0, 1)

class Terminal:
    def write(self, text):
        os.kill(os.getpid(), signal.SIGINT)

    def flush(self):
        pass

def work(arguments):
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background leaves it ignored
last, load = Last(), cli.load
cli.load = lambda reference: load(reference) if reference.endswith("Arguments") else work
if sys.argv.pop(1) == "again in the message":
    sys.stderr = Terminal()
"""
ENTRIES = {
    "python -m qwhisper": "runpy.run_module('qwhisper', run_name='__main__')",
    "finetune_audio.py": "sys.argv.remove('train'); runpy.run_path('finetune_audio.py', run_name='__main__')",
    "qwhisper": """
import tomllib
from importlib.metadata import EntryPoint
with open("pyproject.toml", "rb") as file:
    script = tomllib.load(file)["project"]["scripts"]["qwhisper"]
sys.exit(EntryPoint("qwhisper", script, "console_scripts").load()())
""",
}


@pytest.mark.parametrize("first", ["once", "again in the message"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_interrupted_process_keeps_its_exit_code_if_ctrl_c_comes_again(entry, first):
    flags = ["train", "--train_file", "data.jsonl", "--output_dir", "run"]
    command = [sys.executable, "-c", PROCESS + ENTRIES[entry], first, *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        said = process.stderr.read()
    assert process.returncode == INTERRUPTED
    assert said == ("qwhisper: interrupted\n" if first == "once" else "")
