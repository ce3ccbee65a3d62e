"""From a verb's command line and its recipe to its arguments dataclass.

A field becomes a flag as in transformers' HfArgumentParser, which takes a second to import. A recipe's entries are put
before the words of the command line, so that both pass the same checks and the command line wins.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from qwhisper.checkpoint.places import found_again, run_of_config
from qwhisper.commands import Verb
from qwhisper.errors import UsageError
from qwhisper.flags import Arguments
from qwhisper.nearest_flag import nearest_flag, unknown_flag

RECIPES = Path(__file__).parent / "recipes"
_OWN = ("help", "config")  # flags of every verb that are not fields


def parse(name: str, verb: Verb, arguments_class: type[Arguments], argv: list[str]) -> Any:
    """The arguments of `qwhisper NAME argv…`, or None after printing help. Raises UsageError."""
    parser = make_parser(name, verb, arguments_class)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    flags = flag_names(arguments_class, verb.positionals)
    _check_flags(argv, flags, arguments_class.NO_FLAGS)
    recipe = Recipe.find(_config_of(argv), flags, arguments_class.NO_FLAGS)
    try:
        namespace, rest = parser.parse_known_args(recipe.argv + argv)
        if rest and re.match("-[a-zA-Z]", rest[0]):
            short = rest[0].lstrip("-").partition("=")[0].replace("-", "_")
            nearest = nearest_flag(short, flags)
            hint = f"did you mean --{nearest}?" if nearest else f"see qwhisper {name} --help"
            raise UsageError(f"unknown flag {rest[0]}: flags begin with two dashes; {hint}")
        if rest:
            raise UsageError(f"{rest[0]!r} belongs to no flag; see qwhisper {name} --help")
        values = vars(namespace)
        del values["config"]
        return arguments_class(**values)
    except UsageError as error:
        raise UsageError(recipe.locate(str(error), argv)) from None


def make_parser(name: str, verb: Verb, arguments_class: type[Arguments]) -> "Parser":
    """A parser with one group of flags for every section of the dataclass."""
    words = "".join(f" {word.upper()}" for word in verb.positionals)
    parser = Parser(
        prog=f"qwhisper {name}",
        usage=f"qwhisper {name}{words} [--flag value ...]",
        description=verb.summary,
        epilog=f"example: {verb.example}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    fields_by_name, hints = {f.name: f for f in dataclasses.fields(arguments_class)}, get_type_hints(arguments_class)
    for title, fields in sections_of(arguments_class):
        group = parser.add_argument_group(title)
        for f in fields:
            if f.name not in verb.positionals:
                _add_flag(group, f, hints[f.name])
    for word in verb.positionals:
        parser.add_argument(word, metavar=word.upper(), help=fields_by_name[word].metadata["help"])
    parser.add_argument(
        "--config", help="YAML file of flags, or the name of a shipped recipe; flags win over the file."
    )
    return parser


def sections_of(arguments_class: type[Arguments]) -> list[tuple[str, list[dataclasses.Field]]]:
    """Title and fields of every section: the bases with an `_argument_group_name`, or else the class itself."""
    by_name = {f.name: f for f in dataclasses.fields(arguments_class)}
    bases = [base for base in reversed(arguments_class.__mro__) if "_argument_group_name" in vars(base)]
    if not bases:
        return [("flags", list(by_name.values()))]
    return [(vars(base)["_argument_group_name"], [by_name[f.name] for f in dataclasses.fields(base)]) for base in bases]


def flag_names(arguments_class: type[Arguments], positionals: Iterable[str] = ()) -> list[str]:
    """Every name that may follow "--", including the `no_` form of flags that are on by default."""
    fields = [f for f in dataclasses.fields(arguments_class) if f.name not in positionals]
    return [f.name for f in fields] + [f"no_{f.name}" for f in fields if f.default is True]


def _add_flag(group: argparse._ArgumentGroup, f: dataclasses.Field, hint: Any) -> None:
    """--snake_case with --kebab-case beside it; --no_… as well for a bool that is on by default."""
    options = {name: value for name, value in f.metadata.items() if name != "bounds"}  # the rest goes to argparse
    options["help"] = options["help"].replace("%", "%%")  # which formats help texts
    options["required"] = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    if f.default is not dataclasses.MISSING:
        options["default"] = f.default
    elif f.default_factory is not dataclasses.MISSING:
        options["default"] = f.default_factory()
    if NoneType in get_args(hint):
        hint = get_args(hint)[0]
    if hint is bool:
        options |= {"type": _truth, "nargs": "?", "const": True}
    elif get_origin(hint) is Literal:
        options["choices"] = get_args(hint)
    elif get_origin(hint) is list:
        options |= {"type": get_args(hint)[0], "nargs": "+"}
    else:
        options["type"] = hint
    group.add_argument(*_spellings(f.name), **options)
    if f.default is True:
        group.add_argument(*_spellings(f"no_{f.name}"), dest=f.name, action="store_false", default=True)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _truth(word: str) -> bool:
    known = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return known[word.lower()]


class Parser(argparse.ArgumentParser):
    """Raises argparse's errors as UsageError, without the long usage text."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"/--[a-z0-9-]+", "", message).replace("argument --", "--")
        raise UsageError(f"{message}; see {self.prog} --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line per flag: only --snake_case, with --no_… beside it; the default only if there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        flag = action.option_strings[0]
        if isinstance(action.default, bool):
            return f"{flag}, --no_{action.dest}" if action.default else flag
        values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE"
        return (
            f"{flag} [{values}]"
            if action.nargs == "?"
            else f"{flag} {values}" + (" ..." if action.nargs == "+" else "")
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ([], "") or action.required:
            return action.help
        return super()._get_help_string(action)


def _check_flags(argv: list[str], flags: list[str], no_flags: Mapping[str, str]) -> None:
    for name in _flags_in(argv):
        if name not in flags and name not in _OWN:
            raise UsageError(unknown_flag(name, flags, no_flags, dashes="--"))


def _flags_in(argv: Iterable[str]) -> list[str]:
    return [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--") and word != "--"]


def _config_of(argv: list[str]) -> str | None:
    parser = Parser(allow_abbrev=False, add_help=False, prog="qwhisper")
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def shipped_recipes() -> list[str]:
    """Names for --config of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A YAML file of flags: its entries as command-line words, and the line of each for messages.

    Relative paths in it are relative to the current folder, as on the command line. A run's own config.yaml has none,
    and its output_dir is the folder that contains it.
    """

    path: Path | None
    argv: list[str]
    lines: dict[str, int]

    @classmethod
    def find(cls, config: str | None, flags: list[str], no_flags: Mapping[str, str]) -> "Recipe":
        """The recipe that --config names: a file, or one that is shipped. Without --config an empty one."""
        if config is None:
            return cls(None, [], {})
        path = Path(config)
        if not path.is_file():
            name = config.removesuffix(".yaml")
            if name not in shipped_recipes():
                nearest = difflib.get_close_matches(name, shipped_recipes(), n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"shipped: {', '.join(shipped_recipes())}"
                raise UsageError(f"--config {config}: no such file, and no recipe of that name is shipped; {hint}")
            path = RECIPES / f"{name}.yaml"
        return cls._read(path, flags, no_flags)

    @classmethod
    def _read(cls, path: Path, flags: list[str], no_flags: Mapping[str, str]) -> "Recipe":
        import yaml  # --help does without

        try:
            text = path.read_text(encoding="utf-8")
            node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
        if node is None:  # nothing but comments
            return cls(path, [], {})
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{path}: a recipe is a list of `flag: value` lines, and this one is something else")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"{path}:{line}: {key.value} is set in line {lines[key.value]} already; keep one")
            if key.value not in flags:
                raise UsageError(f"{path}:{line}: {unknown_flag(key.value, flags, no_flags, dashes='')}")
            if key.value.startswith("no_"):
                raise UsageError(
                    f"{path}:{line}: write `{key.value.removeprefix('no_')}: false` instead of {key.value}"
                )
            lines[key.value] = line
        if run_folder := run_of_config(path):
            values = found_again(values, run_folder)
        argv = [word for key, value in values.items() for word in cls._words(f"{path}:{lines[key]}", key, value)]
        # A flag with one value comes last, so that no list takes the first word of the command line.
        return cls(path, [*argv, f"--config={path}"], lines)

    @staticmethod
    def _words(where: str, key: str, value: Any) -> list[str]:
        if value is None or value == []:
            return []
        if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
            return [f"--{key}", *map(str, value)]
        if isinstance(value, list | dict):
            raise UsageError(f"{where}: {key} must be a plain value or a list of plain values")
        return [f"--{key}={value}"]

    def locate(self, message: str, argv: list[str]) -> str:
        """`message` after file and line, if it is about a flag that only the recipe sets."""
        for name in re.findall(r"--(\w+)", message):
            if name in self.lines and name not in _flags_in(argv):
                return f"{self.path}:{self.lines[name]}: {message}"
        return message
