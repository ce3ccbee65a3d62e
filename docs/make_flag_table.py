"""Writes the flag table of `qwhisper train` into docs/flags.md, between its two marks: python docs/make_flag_table.py

The text comes from qwhisper/train/flag_sections.py. The reasons in docs/flags.zh.md are written by hand;
tests/test_docs.py checks that both tables have the flags and defaults of the code.
"""

import dataclasses
import re
from pathlib import Path

from marked import table, write_between_marks

from qwhisper.parsing import sections_of
from qwhisper.train.arguments import TrainArguments

PAGE = Path(__file__).parent / "flags.md"
CHINESE_DEFAULTS = {
    "required": "必填",
    "on": "开",
    "off": "关",
    "none": "无",
    "the JSONL file's own folder": "JSONL 所在目录",
    "the length that the language model was made for": "语言模型支持的长度",
    "the first GPU if there is one": "有 GPU 则用第一块",
    "all of them": "全部",
    "the name of --output_dir": "--output_dir 的名字",
}
STATED_DEFAULT = re.compile(r" ?\(default: (?P<short>[^;,)]*)(?P<rest>[;,][^)]*)?\)")


def default_and_reason(field: dataclasses.Field) -> tuple[str, str]:
    """The table's last two columns. A default that depends on other flags stands in the help text."""
    reason = field.metadata["help"]
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required", reason
    stated = STATED_DEFAULT.search(reason)
    if stated:
        short = stated["short"]
        if not stated["rest"]:
            reason = reason.replace(stated[0], "")
        return (f"`{short}`" if re.fullmatch(r"[\w./-]*[\d/_][\w./-]*", short) else short), reason
    if isinstance(field.default, bool):
        return ("on" if field.default else "off"), reason
    return ("–" if field.default is None else f"`{field.default}`"), reason


def flag_label(field: dataclasses.Field) -> str:
    return f"`--{field.name}`" + (f" `--no_{field.name}`" if field.default is True else "")


def flag_table() -> str:
    """The whole table as Markdown, one part a section."""
    parts = []
    for title, fields in sections_of(TrainArguments):
        rows = [(flag_label(field), *default_and_reason(field)) for field in fields]
        parts.append(f"**{title}**\n\n{table('flag | default | why', rows)}")
    return "\n\n".join(parts)


def main() -> None:
    write_between_marks(PAGE, {"flags": flag_table()})


if __name__ == "__main__":
    main()
