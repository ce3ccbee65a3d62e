"""The documentation says what the code does: flag tables, commands, recipes, links between its files."""

import dataclasses
import importlib
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import TrainingArguments

import qwhisper
from qwhisper import cli
from qwhisper.checkpoint.manifest import write_manifest
from qwhisper.commands import VERBS
from qwhisper.guards.alarms import Alarm
from qwhisper.model.qwen3_audio import build_from_bases
from qwhisper.parsing import parse, shipped_recipes
from qwhisper.report.kinds import KINDS
from qwhisper.train.state import TrainState
from tests.small import write_dialogues, write_small_bases

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
DATA = ("docs/data.md", "docs/data.zh.md")
FLAGS = ("docs/flags.md", "docs/flags.zh.md")
STABILITY = ("docs/stability.md", "docs/stability.zh.md")
LEARNING = ("docs/learning.md", "docs/learning.zh.md")
PAIRS = (READMES, DATA, FLAGS, STABILITY, LEARNING)
CHINESE = tuple(chinese for _, chinese in PAIRS)
PAGES = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *DATA,
    *FLAGS,
    *STABILITY,
    *LEARNING,
    "docs/audio.md",
    "docs/events.md",
    "docs/huggingface.md",
    "docs/reliability.md",
    "docs/silence.md",
    "docs/performance.md",
)

sys.path.insert(0, str(ROOT / "docs"))  # which is no package
between_marks = importlib.import_module("marked").between_marks


@pytest.fixture(scope="module")
def table():
    """The module docs/make_flag_table.py."""
    return importlib.import_module("make_flag_table")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def first_two_columns(text):
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `--")]
    return [(row[0], row[1]) for row in rows]


def test_the_flag_table_is_the_one_of_the_code(table):
    assert between_marks(read(FLAGS[0]), "flags") == table.flag_table(), "run: python docs/make_flag_table.py"


def test_the_chinese_flag_table_has_the_same_flags_and_defaults(table):
    english = first_two_columns(table.flag_table())
    expected = [(flag, table.CHINESE_DEFAULTS.get(default, default)) for flag, default in english]
    assert first_two_columns(between_marks(read(FLAGS[1]), "flags")) == expected


def commands(name):
    blocks = re.findall(r"```bash\n(.*?)```", read(name), flags=re.DOTALL)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in words if line[:1] == ["qwhisper"]]


@pytest.mark.parametrize("pages", PAIRS)
def test_both_languages_show_the_same_commands(pages):
    assert commands(pages[0]) == commands(pages[1])


def test_the_readme_shows_the_whole_path():
    verbs = {argv[0] for argv in commands("README.md")}
    assert verbs >= {"train", "verify", "eval", "chat"} and len(commands("README.md")) >= 8


@pytest.mark.parametrize("argv", [argv for english, _ in PAIRS for argv in commands(english)], ids=" ".join)
def test_commands_of_the_pages_parse(argv, tmp_path):
    (tmp_path / "config.yaml").write_text("train_file: data.jsonl\noutput_dir: run\n", encoding="utf-8")
    argv = [str(tmp_path / "config.yaml") if word == "run/config.yaml" else word for word in argv]
    name = next(name for name in VERBS if argv[: len(name.split())] == name.split())
    assert parse(name, VERBS[name], cli.load(VERBS[name].arguments), argv[len(name.split()) :]) is not None


@pytest.mark.parametrize("name", READMES)
def test_every_recipe_is_named(name):
    assert all(f"`{recipe}`" in read(name) for recipe in shipped_recipes())


@pytest.mark.parametrize("name", [*READMES, *PAGES])
def test_links_within_the_repository_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", read(name))
    targets = [(((ROOT / name).parent / path) if path else ROOT / name, anchor) for path, anchor in links]
    assert [str(path) for path, anchor in targets if not path.exists()] == []
    assert [(str(path), anchor) for path, anchor in targets if anchor and anchor not in anchors(path)] == []


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(name):
    """The lines of a page without code and addresses of links."""
    text = re.sub(r"```.*?```|^    [^\n]*$|<!--.*?-->", "", read(name), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"\]\([^)]*\)|https?://\S+", "]", text)).splitlines()


@pytest.mark.parametrize("name", CHINESE)
def test_chinese_sentences_have_full_width_punctuation(name):
    half = re.compile(r"[\u3001-\u9fff\uff01-\uff5e`][,:;?!(]|[\u4e00-\u9fff]\)|[,:;?!)(][\u4e00-\u9fff]")
    assert [line for line in prose(name) if half.search(line)] == []


@pytest.mark.parametrize("name", CHINESE)
def test_chinese_paragraphs_stand_on_one_line(name):
    """A line break shows as a space, which Chinese text has none of."""
    lines = prose(name)
    broken = [line for before, line in pairwise(lines) if before.strip() and re.match(r"\s*[\u4e00-\u9fff]", line)]
    assert [line for line in broken if not line.lstrip().startswith("|")] == []


def test_the_table_of_silences_is_the_one_of_the_results():
    made = importlib.import_module("make_silence_table").silence_table()
    assert between_marks(read("docs/silence.md"), "silence") == made, "run: python docs/make_silence_table.py"


def test_the_performance_tables_are_those_of_the_results():
    module = importlib.import_module("make_performance_tables")
    for name, make in module.TABLES.items():
        shown = between_marks(read("docs/performance.md"), name)
        assert shown == module.or_none_yet(make()), "run: python docs/make_performance_tables.py"


def test_the_tables_of_events_and_metrics_are_those_of_the_code():
    made, page = importlib.import_module("make_event_tables"), read("docs/events.md")
    for name, make in made.TABLES.items():
        assert between_marks(page, name) == make(), "run: python docs/make_event_tables.py"


def test_the_tables_of_faults_are_those_of_the_fault_tests():
    made, page = importlib.import_module("make_reliability_table"), read("docs/reliability.md")
    for name, make in made.TABLES.items():
        assert between_marks(page, name) == make(), "run: python docs/make_reliability_table.py"


@pytest.mark.parametrize("script", ["make_stability_tables", "make_learning_tables", "make_readme_results"])
def test_the_tables_of_a_page_are_those_of_the_results(script):
    made = importlib.import_module(script)
    for language, page in made.PAGES.items():
        for name, make in made.TABLES.items():
            shown = between_marks(page.read_text(encoding="utf-8"), name)
            assert shown == make(made.WORDS[language]), f"run: python docs/{script}.py"


def outline(name):
    """Levels of the headings, and how many rows each section's tables have."""
    _, *sections = re.split(r"^(#+) .*$", read(name), flags=re.MULTILINE)
    rows = [len(re.findall(r"^\|", body, flags=re.MULTILINE)) for body in sections[1::2]]
    return list(zip(sections[::2], rows, strict=True))


@pytest.mark.parametrize("pages", PAIRS)
def test_both_pages_have_the_same_sections_tables_links_and_example(pages):
    english, chinese = pages
    assert outline(english) == outline(chinese)
    assert examples(english) == examples(chinese)
    tests = [re.findall(r"\]\((\.\./(?:tests|qwhisper|benchmarks)/[^)]+)\)", read(name)) for name in pages]
    assert tests[0] == tests[1]


def events_and_alarms():
    """Every kind that a run may write into events.jsonl, as declared; an alarm's own in the place of "alarm"."""
    alarms = re.search(r"kind: one of ([\w, ]+)\.", Alarm.__doc__)[1].split(", ")
    return {*(kind.kind for kind in KINDS), *alarms} - {"alarm"}


@pytest.mark.parametrize("name", STABILITY)
def test_every_event_and_alarm_stands_beside_its_symptom(name):
    symptoms = "\n".join(line for line in read(name).splitlines() if line.startswith("|") and line.count(" | ") == 3)
    kinds = events_and_alarms()
    assert len(kinds) > 15
    assert {kind for kind in kinds if f"`{kind}`" not in symptoms} == set()


def examples(name):
    return re.findall(r"```python\n(.*?)```", read(name), flags=re.DOTALL)


@pytest.fixture
def beside_models(tmp_path, monkeypatch):
    """A working folder in which the names of the real models are small ones, with dialogues and a trained run."""
    audio, text = write_small_bases(tmp_path / "bases")
    for small, real in ((audio, "openai/whisper-large-v3-turbo"), (text, "Qwen/Qwen3-0.6B")):
        shutil.copytree(small, tmp_path / real)
    write_dialogues(tmp_path, count=4, name="data.jsonl")
    shutil.copy(tmp_path / "clip0.wav", tmp_path / "question.wav")
    model, processor = build_from_bases(str(audio), str(text))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run" / "checkpoint-200")
    TrainState(step=200).write(tmp_path / "run" / "checkpoint-200")
    write_manifest(tmp_path / "run" / "checkpoint-200", 200, True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("beside_models")
def test_the_readmes_python_answers_and_trains(capsys, monkeypatch):
    train, bases = qwhisper.finetune, {"audio_model": "openai/whisper-large-v3-turbo", "text_model": "Qwen/Qwen3-0.6B"}
    monkeypatch.setattr(qwhisper, "finetune", lambda *given, **flags: train(*given, **flags | bases | {"max_steps": 1}))
    assistant, training, model = examples("README.md")
    names: dict = {}
    exec(assistant.replace("stream.answer.text", "'It says ' + stream.answer.text"), names)  # white space, untrained
    assert len(names["messages"]) == 3 and names["stream"].answer.completion_tokens > 0
    exec(training, names)
    exec(model, names)
    said = capsys.readouterr().out
    assert names["result"].steps == 1 and names["result"].checkpoint == Path("my-run/checkpoint-1")
    assert names["answer"] and "<|audio_pad|>" not in names["answer"] and names["answer"] in said


@pytest.mark.usefixtures("beside_models")
def test_the_example_with_a_plain_trainer_trains(monkeypatch):
    (example,) = examples("docs/stability.md")
    monkeypatch.setattr("transformers.TrainingArguments", lambda **given: TrainingArguments(**given, use_cpu=True))
    names = {}
    exec(example, names)
    assert names["trainer"].state.global_step == 1 and names["trainer"].skipped_steps == 0
    assert (Path("hf-run") / "final" / "projector.safetensors").is_file()


@pytest.mark.parametrize("pages", PAIRS)
def test_both_languages_cite_the_same_sources(pages):
    english, chinese = (re.findall(r"\]\((https?://[^)]+)\)", read(name)) for name in pages)
    assert english == chinese


def test_every_flag_that_is_named_exists():
    classes = [cli.load(verb.arguments) for verb in VERBS.values()]
    flags = {field.name for arguments in classes for field in dataclasses.fields(arguments)} | {"config", "help"}
    for name in (*READMES, *PAGES):
        prose = re.sub(r"```.*?```", "", read(name), flags=re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", "\n".join(re.findall(r"`[^`]+`", prose))))
        assert {flag for flag in named if flag.removeprefix("no_") not in flags} <= {"no_x"}, name


def test_the_architecture_names_every_package_and_every_module_beside_them():
    page = read("ARCHITECTURE.md")
    packages = {path.parent.name for path in (ROOT / "qwhisper").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`qwhisper/(\w+)/`", page))
    modules = {path.name for path in (ROOT / "qwhisper").glob("*.py") if not path.name.startswith("__")}
    assert modules <= set(re.findall(r"\]\(qwhisper/(\w+\.py)\)", page))
