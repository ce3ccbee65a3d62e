"""transformers' Auto classes know our model after a bare `import qwhisper`, in any order of imports."""

import builtins
import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import (
    AudioFlamingo3Config,
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen2AudioConfig,
    pipeline,
)
from transformers.models.auto import modeling_auto

from qwhisper import Qwen3AudioForConditionalGeneration, auto_classes
from qwhisper.auto_classes import ENTRIES, NAME_LISTS, Finder, Registered

ROOT = Path(__file__).parents[1]
CONFIG_AUTO = next(iter(ENTRIES))


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


USE = """
import sys, qwhisper
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers import AutoTokenizer, GenerationConfig, pipeline
for auto in (AutoConfig, AutoTokenizer, AutoFeatureExtractor, AutoProcessor, AutoModel, AutoModelForMultimodalLM,
             GenerationConfig):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
answer = pipeline("any-to-any", model=sys.argv[1])
assert type(answer.model) is getattr(transformers, answer.model.config.architectures[0])
print(type(answer.model).__name__, type(answer.processor).__name__)
question = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
print(answer(text=question, max_new_tokens=2)[0]["generated_text"][-1]["role"])
"""
USED = [
    "Qwen3AudioConfig",
    "TokenizersBackend",
    "WhisperFeatureExtractor",
    "Qwen3AudioProcessor",
    "Qwen3AudioModel",
    "Qwen3AudioForConditionalGeneration",
    "GenerationConfig",
    "Qwen3AudioForConditionalGeneration Qwen3AudioProcessor",
    "assistant",
]


@pytest.mark.usefixtures("without_librosa")
@pytest.mark.parametrize("part", ["checkpoint-2", ""])
def test_auto_classes_and_pipelines_take_a_checkpoint_and_a_run(finished_run, monkeypatch, capsys, part):
    """In this process, where tests/fixtures.py imported qwhisper before transformers, as a user may."""
    monkeypatch.setattr(sys, "argv", ["-c", str(finished_run / part)])
    exec(USE, {})
    assert capsys.readouterr().out.splitlines() == USED


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoint-2", ""])
def test_a_bare_import_is_enough_for_auto_classes_and_pipelines(finished_run, part):
    # What the fixture without_librosa does, in the other process.
    unasked = "import transformers.pipelines.any_to_any as asks\nasks.requires_backends = lambda *_: None\n"
    assert run(USE.replace("answer =", f"{unasked}answer ="), str(finished_run / part)) == USED


@pytest.mark.usefixtures("without_librosa")
def test_a_pipeline_answers_audio_and_text_of_a_run_as_its_model_does(finished_run):
    clip = str(finished_run.parent / "data" / "clip0.wav")
    parts = [{"type": "audio", "audio": clip}, {"type": "text", "text": "Pitch?"}]
    chat = [{"role": "user", "content": parts}]
    settings = {"max_new_tokens": 4, "do_sample": False}
    for placed in ({}, {"device_map": "auto"}, {"device": "cpu", "dtype": "float32"}):
        answer = pipeline("any-to-any", model=str(finished_run), **placed)
        said = answer(text=chat, generate_kwargs=settings, return_full_text=False)[0]["generated_text"]
        inputs = answer.processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True
        ).to(answer.model.device)
        tokens = answer.model.generate(**inputs, **settings)
        expected = answer.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        assert len(expected) > 0 and expected.endswith(said) and said


@pytest.mark.parametrize("part", ["checkpoint-2", ""])
def test_a_generation_config_is_that_of_the_best_checkpoint(finished_run, part):
    folder = finished_run / part
    kept = Qwen3AudioForConditionalGeneration.from_pretrained(finished_run).generation_config.to_dict()
    assert kept["eos_token_id"] is not None and kept["max_new_tokens"] is None
    assert GenerationConfig.from_pretrained(folder).to_dict() == kept
    for config in (
        GenerationConfig.from_pretrained(str(folder), "generation_config.json", max_new_tokens=7),
        GenerationConfig.from_pretrained(pretrained_model_name=folder, max_new_tokens=7),
        GenerationConfig.from_pretrained(folder, max_new_tokens=7, is_new=1, return_unused_kwargs=True)[0],
    ):
        assert config.to_dict() == kept | {"max_new_tokens": 7}


@pytest.mark.parametrize(("parent", "folder"), [("", "run"), ("", "run/checkpoint-1"), ("run", "checkpoint-1")])
def test_a_run_or_its_checkpoint_may_be_a_subfolder(finished_run, parent, folder):
    """Each class reads there what it reads in the folder itself."""
    parent, subfolder = finished_run.parent / parent, {"subfolder": folder}
    expected = Qwen3AudioForConditionalGeneration.from_pretrained(parent / folder)
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path=parent, **subfolder)
    assert config.text_base == expected.config.text_base is not None
    assert GenerationConfig.from_pretrained(parent, **subfolder).to_dict() == expected.generation_config.to_dict()
    assert AutoTokenizer.from_pretrained(parent, **subfolder)("Hi").input_ids
    assert AutoProcessor.from_pretrained(parent, **subfolder).tokenizer("Hi").input_ids
    found = [cls.from_pretrained(parent, **subfolder).state_dict() for cls in (AutoModel, AutoModelForMultimodalLM)]
    for prefix, state in zip(("model.", ""), found, strict=True):
        weights = expected.state_dict()
        assert state and all(torch.equal(tensor, weights[prefix + name]) for name, tensor in state.items())


def test_a_generation_config_of_another_folder_is_read_as_before(tmp_path):
    with pytest.raises(OSError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(pretrained_model_name=tmp_path).max_new_tokens == 3


def test_our_model_is_registered_as_the_librarys_audio_models_are(finished_run):
    config = AutoConfig.from_pretrained(finished_run)
    mappings = {name: mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING")}
    theirs = [{name for name, m in mappings.items() if c in m} for c in (AudioFlamingo3Config, Qwen2AudioConfig)]
    ours = {name for name, mapping in mappings.items() if type(config) in mapping}
    assert ours == theirs[0] | theirs[1]


def test_our_class_stands_in_the_lists_of_names_that_libraries_ask(finished_run):
    """Trainer and `transformers serve` do; the Auto classes by these lists stay as they are."""
    for name in NAME_LISTS["transformers.models.auto.modeling_auto"]:
        assert getattr(modeling_auto, name)["qwen3_audio"] == "Qwen3AudioForConditionalGeneration"
    assert type(AutoConfig.from_pretrained(finished_run)) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    assert all(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.items())


def test_auto_classes_read_other_folders_as_before(finished_run, tmp_path):
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoConfig.from_pretrained(tmp_path)
    shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "Qwen3AudioConfig"
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()  # as another library's run
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["AutoConfig", "AutoConfig, AutoProcessor, AutoModelForMultimodalLM"])
def test_auto_classes_that_were_imported_before_know_our_model_as_well(before, finished_run):
    code = f"""
import sys
from transformers import {before}
import qwhisper
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config) in AutoModel._model_mapping and type(config) in PROCESSOR_MAPPING
assert type(config) in AutoModelForMultimodalLM._model_mapping
print("qwhisper.model.qwen3_audio" in sys.modules, AutoModelForMultimodalLM._model_mapping[type(config)].__name__)
"""
    assert run(code, str(finished_run / "checkpoint-2")) == ["False Qwen3AudioForConditionalGeneration"]


class Config:
    model_type = "qwen3_audio"


CLASSES = {"Qwen3AudioConfig": Config, "Ours": object()}


@pytest.fixture
def loaded():
    """Names of our classes that a mapping has imported so far."""
    return []


@pytest.fixture
def registered(loaded):
    """What is registered by configuration: a class of somebody else, and ours."""

    def load(name):
        loaded.append(name)
        return CLASSES[name]

    return Registered({int: "theirs"}, load, "Ours", by_type=False)


def test_a_lookup_of_another_model_imports_nothing_of_ours(registered, loaded):
    assert int in registered and registered[int] == registered.get(int) == "theirs"
    assert str not in registered and registered.get(str) is None
    with pytest.raises(KeyError):
        registered[str]
    assert loaded == []


def test_a_list_of_the_keys_imports_our_configuration_alone(registered, loaded):
    assert list(registered) == list(registered.keys()) == [int, Config] and len(registered) == 2
    assert Config in registered
    assert set(loaded) == {"Qwen3AudioConfig"}


def test_our_class_is_looked_up_listed_and_copied_like_any_other(registered):
    ours = CLASSES["Ours"]
    assert registered[Config] is registered.get(Config) is ours
    assert list(registered.values()) == ["theirs", ours]
    assert dict(registered) == dict(registered.items()) == {int: "theirs", Config: ours}


def test_what_a_user_registers_in_our_place_stays(registered):
    registered[Config] = "another"
    assert registered[Config] == "another" and list(registered.values()) == ["theirs", "another"]


def test_a_configuration_derived_from_ours_is_not_taken_for_ours(registered):
    derived = type("Derived", (Config,), {})
    assert derived not in registered and registered.get(derived) is None


def test_where_our_class_cannot_be_imported_its_own_lookup_says_so_and_lists_go_on():
    def load(name):
        raise ImportError(f"no {name}")

    by_type = Registered({"theirs": int}, load, "Ours", by_type=True)
    by_config = Registered({int: "theirs"}, load, "Ours", by_type=False)
    assert dict(by_type.items()) == {"theirs": int} and list(by_config.values()) == ["theirs"]
    assert len(by_config) == 1 and list(by_config) == [int]
    with pytest.raises(ImportError, match="no Ours"):
        by_type["qwen3_audio"]
    with pytest.raises(ImportError, match="no Qwen3AudioConfig"):
        by_config[Config]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in which a module `mappings` makes CONFIG_MAPPING, and ENTRIES for it and for one that makes none."""
    (tmp_path / "autos").mkdir()
    (tmp_path / "autos/__init__.py").touch()
    (tmp_path / "autos/mappings.py").write_text(
        "from types import SimpleNamespace\nCONFIG_MAPPING = SimpleNamespace(_extra_content={})\n"
    )
    (tmp_path / "autos/empty.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, Finder)])
    entries = {"autos.mappings": {"CONFIG_MAPPING": "Ours", "NO_MAPPING": "Ours"}, "autos.empty": {"OLD": "Ours"}}
    monkeypatch.setattr(auto_classes, "ENTRIES", entries)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "autos"]:
        del sys.modules[name]


@pytest.mark.parametrize("first", ["mappings", "ours"])
def test_entries_are_made_whichever_is_imported_first(package, first):
    if first == "mappings":
        importlib.import_module("autos.mappings")
    auto_classes.register_when_loaded(CLASSES.get)
    module = importlib.import_module("autos.mappings")
    assert module.CONFIG_MAPPING._extra_content["qwen3_audio"] is CLASSES["Ours"]
    importlib.import_module("autos.empty")


def test_entries_are_made_in_a_module_that_another_thread_is_importing(package, tmp_path, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    source = tmp_path / "autos/mappings.py"
    source.write_text("import builtins\nbuiltins.wait_in_mappings()\n" + source.read_text())
    monkeypatch.setattr(builtins, "wait_in_mappings", lambda: (entered.set(), go_on.wait()), raising=False)
    importing = threading.Thread(target=importlib.import_module, args=["autos.mappings"])
    importing.start()
    entered.wait()

    def import_module(name):
        go_on.set()
        return importlib.import_module(name)

    monkeypatch.setattr(auto_classes, "import_module", import_module)
    auto_classes.register_when_loaded(CLASSES.get)
    go_on.set()
    importing.join()
    assert "qwen3_audio" in sys.modules["autos.mappings"].CONFIG_MAPPING._extra_content


def test_a_module_that_was_hooked_keeps_its_own_loader(package):
    auto_classes.register_when_loaded(CLASSES.get)
    module = importlib.import_module("autos.mappings")
    loader = module.__spec__.loader
    assert module.__loader__ is loader and type(loader).__name__ == "SourceFileLoader"
    assert "SimpleNamespace" in loader.get_source("autos.mappings")


def test_entries_are_made_once_and_other_modules_are_left_to_others(package):
    auto_classes.register_when_loaded(CLASSES.get)
    auto_classes.register_when_loaded(CLASSES.get)
    registered = importlib.import_module("autos.mappings").CONFIG_MAPPING._extra_content
    auto_classes.register_when_loaded(CLASSES.get)
    assert importlib.import_module("autos.mappings").CONFIG_MAPPING._extra_content is registered
    assert dict(registered) == {"qwen3_audio": CLASSES["Ours"]}
    assert next(finder for finder in sys.meta_path if isinstance(finder, Finder)).find_spec("autos", None) is None


@pytest.mark.parametrize("mapping", [None, {}, SimpleNamespace(), SimpleNamespace(_extra_content=OrderedDict())])
def test_a_mapping_of_another_form_is_left_as_it_is(mapping):
    module = ModuleType(CONFIG_AUTO)
    module.CONFIG_MAPPING = mapping
    before = json.dumps(vars(mapping) if isinstance(mapping, SimpleNamespace) else mapping)
    auto_classes._register(module, CLASSES.get)
    assert json.dumps(vars(mapping) if isinstance(mapping, SimpleNamespace) else mapping) == before
