"""Registers our classes in transformers' Auto classes as these load; a class of ours is imported when it is looked up.

So `import qwhisper` is enough for `AutoModelForMultimodalLM.from_pretrained(checkpoint)`, and imports no transformers.
An Auto class keeps registered classes in the dict `_extra_content` of its mapping; here a dict that also has our entry
replaces it. The module `transformers` has our classes as attributes in the same way. If transformers has no such
mapping, nothing changes. For a run's folder, which may be a `subfolder`, AutoConfig, AutoTokenizer,
AutoFeatureExtractor and GenerationConfig read the files of its best checkpoint, as our classes do.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from inspect import signature
from types import ModuleType
from typing import Any

MODEL_TYPE, CONFIG = "qwen3_audio", "Qwen3AudioConfig"
# transformers' module -> its mappings, with the name of our class in each. The keys of CONFIG_MAPPING are model types;
# those of the others are configurations.
AUTO, GENERATION = "transformers.models.auto", "transformers.generation.configuration_utils"
ENTRIES = {
    f"{AUTO}.configuration_auto": {"CONFIG_MAPPING": CONFIG},
    f"{AUTO}.modeling_auto": {
        "MODEL_MAPPING": "Qwen3AudioModel",
        # As the library's own audio LMs do.
        "MODEL_FOR_MULTIMODAL_LM_MAPPING": "Qwen3AudioForConditionalGeneration",
        "MODEL_FOR_PRETRAINING_MAPPING": "Qwen3AudioForConditionalGeneration",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": "Qwen3AudioForConditionalGeneration",
    },
    f"{AUTO}.processing_auto": {"PROCESSOR_MAPPING": "Qwen3AudioProcessor"},
    f"{AUTO}.tokenization_auto": {},
    f"{AUTO}.feature_extraction_auto": {},
    GENERATION: {},
}
# transformers' module -> its lists of class names in which ours belongs. Trainer shifts the labels of a class that it
# finds among the causal ones, as it computes the smoothed loss itself; `transformers serve` asks the other one first.
NAME_LISTS = {f"{AUTO}.modeling_auto": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")}
# Auto classes that read files before they choose a class. A run's folder has no such files; its checkpoints have.
READERS = {
    f"{AUTO}.configuration_auto": "AutoConfig",
    f"{AUTO}.tokenization_auto": "AutoTokenizer",
    f"{AUTO}.feature_extraction_auto": "AutoFeatureExtractor",
    GENERATION: "GenerationConfig",
}
CLASSES = {CONFIG, *(name for entries in ENTRIES.values() for name in entries.values())}
READ_RUN = "read_run"  # name of the function that reads a run's folder, for `Load`
Load = Callable[[str], Any]  # gives the class or function of a name


class Registered(dict):
    """The classes registered with one Auto class, and ours, which is imported only as far as a caller needs it.

    Looking up another key imports nothing; listing the keys imports only the configuration. If our class can't be
    imported, its own lookup raises the ImportError, and lists omit it.
    """

    def __init__(self, registered: dict, load: Load, name: str, by_type: bool):
        super().__init__(registered)
        self._load, self._name, self._by_type = load, name, by_type

    def _key(self) -> Any:
        return MODEL_TYPE if self._by_type else self._load(CONFIG)

    def __contains__(self, key: object) -> bool:
        may_be_ours = getattr(key, "model_type", key) == MODEL_TYPE
        return super().__contains__(key) or (may_be_ours and key == self._key())

    def __missing__(self, key: Any) -> Any:
        if key not in self:
            raise KeyError(key)
        self[key] = found = self._load(self._name)
        return found

    def get(self, key: Any, default: Any = None) -> Any:
        with suppress(KeyError):
            return self[key]
        return default

    def _all_keys(self) -> list:
        with suppress(ImportError, AttributeError):  # AttributeError: our module asks for the list while it is imported
            return list(dict.fromkeys([*super().keys(), self._key()]))
        return list(super().keys())

    def __iter__(self) -> Iterator:
        return iter(self._all_keys())

    def __len__(self) -> int:
        return len(self._all_keys())

    def keys(self) -> Any:
        return dict.fromkeys(self._all_keys()).keys()

    def values(self) -> Any:
        return self._whole().values()

    def items(self) -> Any:
        return self._whole().items()

    def _whole(self) -> dict:
        with suppress(ImportError, AttributeError):
            return {key: self[key] for key in self._all_keys()}
        return dict(super().items())


class Names(dict):
    """The objects of the module `transformers` that it doesn't import by itself, and our classes.

    Libraries look the class of a configuration's `architectures` up there, as TRL does for the path of a model.
    """

    def __init__(self, objects: dict, load: Load):
        super().__init__(objects)
        self._load = load

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in CLASSES

    def __missing__(self, name: str) -> Any:
        if name not in CLASSES:
            raise KeyError(name)
        self[name] = found = self._load(name)
        return found


class Finder:
    """A module finder that registers our entries in each module of ENTRIES right after its import."""

    def __init__(self, load: Load):
        self._load = load

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ENTRIES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if spec := finder.find_spec(name, path, target):
                spec.loader = _Loader(spec.loader, self._load)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Runs a module with its own loader, then registers our entries in it."""

    def __init__(self, loader: Any, load: Load):
        self._loader, self._load = loader, load

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # its own loader answers requests for its source
        self._loader.exec_module(module)
        _register(module, self._load)


def _register(module: ModuleType, load: Load) -> None:
    for mapping_name, class_name in ENTRIES[module.__name__].items():
        mapping: Any = getattr(module, mapping_name, None)
        known = getattr(mapping, "_extra_content", None)
        if type(known) is dict:  # neither another form of transformers, nor done already
            by_type = mapping_name == "CONFIG_MAPPING"
            mapping._extra_content = Registered(known, load, class_name, by_type)
    for list_name in NAME_LISTS.get(module.__name__, ()):
        getattr(module, list_name, {}).setdefault(MODEL_TYPE, "Qwen3AudioForConditionalGeneration")
    library: Any = sys.modules["transformers"]
    if type(getattr(library, "_objects", None)) is dict:
        library._objects = Names(library._objects, load)
    reader = getattr(module, READERS.get(module.__name__, ""), None)
    if reader is not None and not hasattr(reader.from_pretrained, "_of_qwhisper"):
        reader.from_pretrained = _reading_runs(reader.from_pretrained, load)


def _reading_runs(inherited: Any, load: Load) -> Any:
    """A `from_pretrained` that does with a run's folder what `inherited`, a class method, does with its checkpoint."""

    place = list(signature(inherited.__func__).parameters)[1]  # the argument's name, which differs between classes

    @wraps(inherited.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        name = args[0] if args else kwargs.get(place)
        if not isinstance(name, str | os.PathLike) or not os.path.isdir(name):
            return inherited.__func__(cls, *args, **kwargs)
        subfolder = kwargs.get("subfolder")
        folder = os.path.join(name, subfolder) if subfolder else name

        def read(found: Any) -> Any:
            where, rest = name, kwargs  # as given, if the folder is no run
            if found is not folder:
                where, rest = found, {key: value for key, value in kwargs.items() if key != "subfolder"}
            given = ((where, *args[1:]), rest) if args else ((), rest | {place: where})
            return inherited.__func__(cls, *given[0], **given[1])

        return load(READ_RUN)(folder, read)

    from_pretrained._of_qwhisper = True  # type: ignore[attr-defined]
    return classmethod(from_pretrained)


def register_when_loaded(load: Load) -> None:
    """Register our entries in the mappings that are loaded, and in the others once they load. load: see `Load`."""
    sys.meta_path.insert(0, Finder(load))  # first, so that no module slips in between
    for name in ENTRIES:
        if name in sys.modules:
            _register(import_module(name), load)  # waits for another thread that imports it
