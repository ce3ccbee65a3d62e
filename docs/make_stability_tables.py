"""Writes the tables of docs/stability.md and docs/stability.zh.md, between their marks, and draws naive_history.png.

    python docs/make_stability_tables.py

The figures come from benchmarks/results/nan_kernel.jsonl and naive_history.jsonl: of every run its latest line. A table
whose results are not there names the command that makes them.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from marked import table, write_in_each_language

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PLOT = DOCS / "naive_history.png"
PAGES = {"en": DOCS / "stability.md", "zh": DOCS / "stability.zh.md"}
ORDER = ("logits", "loss", "gradient", "weights")

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "no_result": "No result of `{command}` is here yet.",
        "from": "From [{file}](../benchmarks/results/{file}): {device}, torch {torch}{more}.",
        "kernels_head": "kernel | mask | {lengths} | error elsewhere, in roundings",
        "tokens": "{} tokens",
        "yes": "yes",
        "no": "no",
        "share": "{share} (from {first})",
        "runs_head": "run | cuDNN attention | steps with NaN | first in | weights at the end | how it ended",
        "on": "on",
        "off": "off",
        "finite": "finite",
        "is_nan": "NaN",
        "logged": "last logged loss {last}, reported mean {mean}",
        "skipped": "{ended}; {count} steps skipped",
        "stages_head": "added | what broke | largest norm, LoRA | projector | steps above 1000 | loss, last 20 | "
        "held-out loss | swapped audio adds",
        "left_out_head": "left out | fp16 | with the guards | bf16 | with the guards",
        "nothing": "nothing",
        "naive": "– (the naive way)",
        "deaf": "weights finite, held-out loss NaN",
        "step_of": "{what} at step {step}",
        "logits": "logits not finite",
        "loss": "loss NaN",
        "gradient": "gradient not finite, first in `{name}`,",
        "weights": "weights NaN after step {step}: {lost}",
        "setting": ", {text_model}, {steps} steps of {batch} samples",
        "padded_to": ", padded to {} tokens",
        "labels": "label spans from the template",
        "kernel": "cuDNN attention off (packed, with guards)",
        "projector_fp32": "projector in fp32",
        "lora_fp32": "LoRA in fp32",
        "layer_norm": "LayerNorm before the projector",
        "small_xavier": "projector Xavier × 0.1",
        "small_lora": "LoRA A × 0.1",
        "clip": "clips: LoRA 5.0, all 1.0",
        "gentle_start": "early rate × 0.2, projector frozen for 20 steps",
        "bf16": "bf16 for fp16",
        "guards": "guards (qwhisper's loop)",
        "careful_rates": "rates of 3e-5: the stable recipe",
        "fused AdamW": "*labels and kernel alone, fused AdamW*",
        "guards alone": "*labels, kernel and guards alone*",
        "exit code": "exit code {code}: {why}",
        "and": ", ",
        "then": "; ",
    },
    "zh": {
        "no_result": "`{command}` 的结果还没有放进来。",
        "from": "数据来自 [{file}](../benchmarks/results/{file})：{device}，torch {torch}{more}。",
        "kernels_head": "内核 | 掩码 | {lengths} | 其余误差（以舍入为单位）",
        "tokens": "{} 个 token",
        "yes": "有",
        "no": "无",
        "share": "{share}（从 {first} 起）",
        "runs_head": "训练 | cuDNN attention | 出现 NaN 的步数 | 最先出现在 | 结束时的权重 | 如何结束",
        "on": "开",
        "off": "关",
        "finite": "有限",
        "is_nan": "NaN",
        "logged": "最后记录的 loss {last}，报告的平均值 {mean}",
        "skipped": "{ended}；跳过 {count} 步",
        "stages_head": "新增措施 | 哪里坏了 | 最大范数，LoRA | 投影器 | 超过 1000 的步数 | 最后 20 步的 loss | "
        "留出集 loss | 互换音频使它增加",
        "left_out_head": "去掉的措施 | fp16 | 加上防护 | bf16 | 加上防护",
        "nothing": "什么都不去掉",
        "naive": "–（朴素写法）",
        "deaf": "权重有限，留出集 loss 为 NaN",
        "step_of": "第 {step} 步{what}",
        "logits": " logits 出现非有限值",
        "loss": " loss 为 NaN",
        "gradient": "梯度出现非有限值，最先在 `{name}`",
        "weights": "第 {step} 步之后权重为 NaN：{lost}",
        "setting": "，{text_model}，{steps} 步，每步 {batch} 个样本",
        "padded_to": "，补齐到 {} 个 token",
        "labels": "按聊天模板划定标签区间",
        "kernel": "关闭 cuDNN attention（有防护时改为打包）",
        "projector_fp32": "投影器用 fp32",
        "lora_fp32": "LoRA 用 fp32",
        "layer_norm": "投影器前加 LayerNorm",
        "small_xavier": "投影器 Xavier × 0.1",
        "small_lora": "LoRA 的 A × 0.1",
        "clip": "裁剪：LoRA 5.0，全局 1.0",
        "gentle_start": "早期学习率 × 0.2，投影器冻结 20 步",
        "bf16": "bf16 代替 fp16",
        "guards": "防护（qwhisper 的训练循环）",
        "careful_rates": "学习率 3e-5：稳定配方",
        "fused AdamW": "*只有标签和内核两项，fused AdamW*",
        "guards alone": "*只有标签、内核和防护*",
        "done": "正常结束",
        "exit code": "退出码 {code}：{why}",
        "and": "、",
        "then": "；",
        "none of 8 samples of this batch can be trained on: d0: no supervised token is left": "这一批的 8 个样本都没有"
        "受监督的 token",
        "numerically dead at step 20": "第 20 步数值失效",
        "qwhisper, padded": "qwhisper，填充",
        "qwhisper, packed": "qwhisper，打包",
        "qwhisper, padded, cuDNN put back on": "qwhisper，填充，重新打开 cuDNN attention",
        "projector": "投影器",
    },
}


def read(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest(lines: Iterable[dict], *keys: str) -> dict[tuple, dict]:
    return {tuple(line.get(key) for key in keys): line for line in lines}


def source(words: dict[str, str], file: str, line: dict, more: str = "") -> str:
    return words["from"].format(file=f"{file}.jsonl", device=line["device"], torch=line["torch"], more=more)


# The kernel


def nan_kernel(words: dict[str, str]) -> str:
    lines = read("nan_kernel")
    trials = latest((line for line in lines if "kernel" in line), "kernel", "length", "log_sum_exp")
    runs = latest((line for line in lines if "run" in line), "run", "cudnn_attention")
    parts = []
    if trials:
        parts += [kernels_table(words, trials), source(words, "nan_kernel", next(iter(trials.values())))]
    if runs:
        some = next(iter(runs.values()))
        lengths = words["padded_to"].format(" / ".join(map(str, some["padded_to"])))
        parts += [runs_table(words, runs), source(words, "nan_kernel", some, words["setting"].format(**some) + lengths)]
    return "\n\n".join(parts) or words["no_result"].format(command="python benchmarks/nan_kernel.py")


def kernels_table(words: dict[str, str], trials: dict[tuple, dict]) -> str:
    """A row a kernel with and without mask, a column a length: the NaN share of the query's gradient."""
    lengths = sorted({length for _, length, _ in trials})
    rows = []
    for kernel in dict.fromkeys(name for name, _, _ in trials):
        for mask, shown in (("masked", "yes"), ("unmasked", "no")):
            found = {key[1:]: line[mask] for key, line in trials.items() if key[0] == kernel and mask in line}
            if found:
                cells = [share_of_nan(words, found, length) for length in lengths]
                rows.append([kernel, words[shown], *cells, max(one["error_in_roundings"] for one in found.values())])
    head = words["kernels_head"].format(lengths=" | ".join(words["tokens"].format(length) for length in lengths))
    return table(head, rows)


def share_of_nan(words: dict[str, str], found: dict[tuple, dict], length: int) -> str:
    """The largest over all log-sum-exps, and the highest of these at which there is any."""
    shares = {lse: one["nan_dq"] for (tokens, lse), one in found.items() if tokens == length}
    bad = [lse for lse, share in shares.items() if share > 0]
    if not shares:  # the kernel does not run at this length
        return "–"
    return words["share"].format(share=f"{max(shares.values()):.0%}", first=f"{max(bad):g}") if bad else "0"


def runs_table(words: dict[str, str], runs: dict[tuple, dict]) -> str:
    rows = []
    for (run, cudnn), line in runs.items():
        if "last_logged_loss" in line:
            ended = words["logged"].format(last=line["last_logged_loss"], mean=line["reported_train_loss"])
        else:
            ended = how_it_ended(words, line)
        weights = words["finite" if line["weights_finite"] else "is_nan"]
        nan, first = f"{line['steps_not_finite']} / {line['steps']}", named(line["first_parameter"])
        rows.append([words.get(run, run), words["on" if cudnn else "off"], nan, first and f"`{first}`", weights, ended])
    return table(words["runs_head"], rows)


def how_it_ended(words: dict[str, str], line: dict) -> str:
    """The reason, and how many steps were skipped."""
    ended = line["ended"].split(" after ")[0].split(" (samples")[0]
    if failed := re.fullmatch(r"exit code (?P<code>\d+): (?P<why>.*)", ended):
        ended = words["exit code"].format(code=failed["code"], why=words.get(failed["why"], failed["why"]))
    return words["skipped"].format(ended=words.get(ended, ended), count=line["steps_skipped"])


def named(parameter: str | None) -> str | None:
    """A parameter's name without what all of them have."""
    if parameter is None:
        return None
    for common in ("base_model.", "model.", "language_model."):
        while parameter.startswith(common):
            parameter = parameter.removeprefix(common)
    return parameter.removesuffix(".weight").removesuffix(".default")


# The history


def naive_history(words: dict[str, str]) -> str:
    lines = read("naive_history")
    runs = latest((line for line in lines if "steps" in line), "run", "added", "left_out", "dtype")
    stages = [line for (run, *_), line in runs.items() if run == "stage"]
    if not stages:
        return words["no_result"].format(command="python benchmarks/naive_history.py")
    others = [line for (run, *_), line in runs.items() if run in ("fused AdamW", "guards alone")]
    parts = ["![](naive_history.png)", stages_table(words, [*stages, *others])]
    if any(run == "without" for run, *_ in runs):
        parts.append(left_out_table(words, runs))
    return "\n\n".join([*parts, source(words, "naive_history", stages[-1], words["setting"].format(**stages[-1]))])


def stages_table(words: dict[str, str], lines: list[dict]) -> str:
    rows = []
    for line in lines:
        added = words[line["added"] or "naive"] if line["run"] == "stage" else words[line["run"]]
        norms, above = line["largest_norm"], line["steps_above_1000"]
        heard = (line.get(key) for key in ("held_out_loss", "swapped_adds"))
        rows.append([added, outcome(words, line), norms["lora"], norms["projector"], above, line["last_loss"], *heard])
    return table(words["stages_head"], rows)


def left_out_table(words: dict[str, str], runs: dict[tuple, dict]) -> str:
    """Each measure left out alone; the first row has all of them."""
    complete = [("stage", name, None, None) for name in ("gentle_start", "bf16", "guards")]
    complete.insert(1, ("without, guarded", None, None, "fp16"))
    rows = [[words["nothing"], *(cell(words, runs.get(key)) for key in complete)]]
    for name in dict.fromkeys(left_out for run, _, left_out, _ in runs if run == "without"):
        kinds = [(run, dtype) for dtype in ("fp16", "bf16") for run in ("without", "without, guarded")]
        rows.append([words[name], *(cell(words, runs.get((run, None, name, dtype))) for run, dtype in kinds)])
    return table(words["left_out_head"], rows)


def cell(words: dict[str, str], line: dict | None) -> str:
    """What broke, or the held-out loss and what swapped audio adds to it."""
    if line is None:
        return ""
    if line["first_not_finite"] or line.get("ended", "done") != "done":
        return outcome(words, line)
    heard = f"{line['held_out_loss']} (+ {line['swapped_adds']})"
    if line["held_out_loss"] is None:
        heard = words["deaf"]
    return words["skipped"].format(ended=heard, count=line["steps_skipped"]) if line.get("steps_skipped") else heard


def outcome(words: dict[str, str], line: dict) -> str:
    """The first thing that broke; what only follows from broken weights is left out."""
    if "ended" in line:
        return how_it_ended(words, line)
    broke = line["first_not_finite"]
    if not broke:
        return words["finite"]
    parts, weights = [], broke.get("weights")
    first = min(broke, key=lambda what: (broke[what], ORDER.index(what)))
    if first != "weights" and (weights is None or broke[first] <= weights):
        what = words[first].format(name=named(line.get("first_gradient")))
        parts.append(words["step_of"].format(what=what, step=broke[first] + 1))
    if weights is not None:
        lost = words["and"].join(f"{words.get(kind, kind)} {count}" for kind, count in line["weights_lost"].items())
        parts.append(words["weights"].format(step=weights + 1, lost=lost))
    return words["then"].join(parts)


def draw() -> None:
    """A panel a run: its gradient norm and its loss over the steps, a cross where its weights were lost."""
    lines = [line for line in read("naive_history") if line["run"] in ("stage", "fused AdamW", "guards alone")]
    runs = list(latest(lines, "run", "added").values())
    if not runs:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = {"figsize": (13, 2.3 * math.ceil(len(runs) / 5)), "layout": "constrained"}
    figure, panels = plt.subplots(math.ceil(len(runs) / 5), 5, sharex=True, sharey=True, squeeze=False, **size)
    for axes in panels.flat[len(runs) :]:
        axes.set_axis_off()
    for axes, line in zip(panels.flat, runs, strict=False):
        draw_run(axes, line)
    figure.supxlabel("optimizer step")
    figure.legend(
        *panels.flat[-1 if len(runs) % 5 == 0 else len(runs) - 1].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=2,
    )
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def draw_run(axes, line: dict) -> None:
    added = line.get("added")
    name = ("+ " + added if added else "naive") if line["run"] == "stage" else line["run"]
    axes.set_title(name.replace("_", " "), fontsize=10)
    axes.set_yscale("log")
    for key, color, label in (("grad_norm", "tab:blue", "gradient norm"), ("loss", "tab:orange", "loss")):
        # What is not finite, or 0, has no place on the axis and leaves a gap.
        values = [value or math.nan for value in line[key]]
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1, marker=".", markersize=2, label=label)
    broke = line["first_not_finite"]
    if "weights" in broke:
        axes.plot([broke["weights"] + 1], [1.0], "x", color="tab:red", markersize=12, markeredgewidth=3)
        axes.annotate(" weights NaN", (broke["weights"] + 1, 1.0), xytext=(8, -3), textcoords="offset points")
    elif line.get("ended", "done") != "done":
        axes.annotate(line["ended"].split(":")[0], (0.5, 0.5), xycoords="axes fraction", ha="center", color="tab:red")


TABLES = {"nan_kernel": nan_kernel, "naive_history": naive_history}


def main() -> None:
    draw()
    write_in_each_language(PAGES, TABLES, WORDS)


if __name__ == "__main__":
    main()
