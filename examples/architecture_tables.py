"""The page that `architectures.py` writes: how many kinds each function works on, and every reason why not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from architecture_checks import CHECKS
from tiny_architectures import Case

WORKS, EXCLUDED, REFUSED, WRONG, NOT_RUN = "works", "excluded", "refused", "wrong", "not run"
RESULTS = (WORKS, EXCLUDED, REFUSED, WRONG, NOT_RUN)
_TITLES = {
    WRONG: "Wrong",
    REFUSED: "Refused",
    EXCLUDED: "Excluded",
    WORKS: "Works, with single layers refused",
    NOT_RUN: "Not run",
}
GROUPS = {
    "": "causal models",
    "seq2seq/": "encoder-decoders",
    "encoder/": "encoders",
    "vision/": "vision models",
    "vision-language/": "models of vision and language",
}
Results = dict[str, dict[str, Any]]
# Share of the causal models without experts on which a function has to work, in percent; the other groups have no goal.
GOALS = {
    **dict.fromkeys(["diagnose"], 99),
    **dict.fromkeys(["prune", "sparsegpt", "quantize", "compensated"], 98),
    **dict.fromkeys(["factorize", "whitened"], 97),
    "drop": 95,
    "narrow": 85,
}
# Number of causal models on which a function worked before there was this sweep, of the `BUILT_BEFORE` that could be
# built with the same version of transformers. Experts were excluded from `quantize`; whitened factors, packed zeros,
# repeated layers and removed experts were not tried.
BEFORE = {
    "diagnose": 137,
    "prune": 132,
    "sparsegpt": 132,
    "drop": 121,
    "quantize": 123,
    "factorize": 101,
    "narrow": 75,
    "owlore": 142,
    "adapter": 137,
    "score": 133,
}
BUILT_BEFORE = 146

_HEAD = """# Architectures

Each function of the package, on a tiny random model of every kind of model that transformers builds from a config of
four layers. A function *works*; works and *excludes* something, which is either weights that it does not reach
(counted here; reports do not name all of them) or a part of the check that the intact model itself does not pass; is
*refused* by one ValueError that names the reason; is *wrong*: a difference without a message, or any other error; or
was *not run*, because no images were found that the model takes. After each refusal the model's weights, buffers,
modules and configs are compared with those before. At the end of a name, `+images` stands for batches of text with
images, and `@vision` for the stack of that name; without it the default stack is changed, and training is not checked
on others. Drop is checked on all stacks. Weights that are read only with a cache of earlier tokens are not looked for.

{versions}. The command, which resumes and runs in shards:

```bash
python examples/architectures.py --output architectures
```

| function | check |
|---|---|
"""
_GOALS_TOLD = f"""The goals, in the first table, are for causal models without experts. Encoder-decoders, encoders,
vision models and models of vision and language stand beside them in tables of their own, without a goal. The column
*before* has the share of {BUILT_BEFORE} causal models on which a function worked before there was this sweep, with the
same version of transformers. Experts were then excluded from `quantize`; `-` was not tried."""


def page(results: Results, versions: dict[str, str]) -> str:
    """The page.

    Args:
        results: kind -> {"built": {"why", "experts"}, and for each check {"result", "why"}}.
        versions: module -> version.
    """
    told = ", ".join(f"{module} {version}" for module, version in versions.items())
    lines = [_HEAD.format(versions=told).rstrip()]
    lines += [f"| {name} | {' '.join((check.__doc__ or '').split())} |" for name, check in CHECKS.items()]
    lines += ["", "## Summary", "", _GOALS_TOLD, *_summary(results)]
    for result, title in _TITLES.items():
        lines += ["", f"## {title}", "", *_reasons(results, result)]
    lines += ["", "## Not built", "", *_not_built(results)]
    return "\n".join(lines) + "\n"


def _summary(results: Results) -> Iterator[str]:
    """A table for each group: numbers of kinds, and the share of those on which a function works."""
    for group, title in GROUPS.items():
        inside = {kind: found for kind, found in results.items() if Case(kind).group == group}
        checked = {kind: found for kind, found in inside.items() if found["built"]["why"] is None}
        if not inside:
            continue
        banks = {kind for kind, found in checked.items() if found["built"]["experts"]}
        more = " goal | before |" if group == "" else ""
        yield f"\n### {title.capitalize()}\n"
        yield f"{len(checked)} of {len(inside)} kinds are built; {_experts(len(banks))}.\n"
        yield f"| function | works | excludes | refused | wrong | not run | works or excludes | without experts |{more}"
        yield f"|---|---:|---:|---:|---:|---:|---:|---:|{'---:|' * more.count('|')}"
        for check in CHECKS:
            count = _counts(checked, check)
            few = _counts({kind: found for kind, found in checked.items() if kind not in banks}, check)
            numbers = " | ".join(str(count[result]) for result in RESULTS)
            yield f"| {check} | {numbers} | {_share(count)} | {_share(few)} |{_goal_and_before(check) if more else ''}"


def _goal_and_before(check: str) -> str:
    goal = f"{GOALS[check]}%" if check in GOALS else "-"
    before = f"{BEFORE[check] / BUILT_BEFORE:.1%}" if check in BEFORE else "-"
    return f" {goal} | {before} |"


def _counts(found: Results, check: str) -> Counter[str]:
    return Counter(entry[check]["result"] for entry in found.values() if check in entry)


def _share(count: Counter[str]) -> str:
    return f"{(count[WORKS] + count[EXCLUDED]) / count.total():.1%}" if count else "-"


def _experts(number: int) -> str:
    verb = "has" if number < 2 else "have"
    return f"{number or 'none'} of them {verb} banks of experts"


def _reasons(results: Results, result: str) -> Iterator[str]:
    """A table of the reasons, each with its functions and kinds."""
    functions: dict[str, dict[str, None]] = {}
    kinds: dict[str, dict[str, None]] = {}
    examples: dict[str, str] = {}
    for kind, found in results.items():
        for check in CHECKS:
            if check in found and found[check]["result"] == result and found[check]["why"]:
                reason = _reason(found[check]["why"])
                functions.setdefault(reason, {})[check] = None
                kinds.setdefault(reason, {})[kind] = None
                examples.setdefault(reason, found[check]["why"])
    if not kinds:
        yield "None."
        return
    yield "| reason | function | kinds |\n|---|---|---|"
    for reason in sorted(kinds, key=lambda reason: -len(kinds[reason])):
        yield f"| {_cell(examples[reason])} | {', '.join(functions[reason])} | {_named(kinds[reason])} |"


def _not_built(results: Results) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    example: dict[str, str] = {}
    for kind, entry in results.items():
        if why := entry["built"]["why"]:
            found.setdefault(_reason(why), []).append(kind)
            example.setdefault(_reason(why), why)
    if not found:
        yield "None."
        return
    yield "A package is missing, or a config of these sizes is none.\n\n| reason | kinds |\n|---|---|"
    yield from (f"| {_cell(example[reason])} | {_named(kinds)} |" for reason, kinds in found.items())


def _reason(why: str) -> str:
    """A reason without the names and numbers of one model, so that equal reasons have equal texts."""
    if re.match(r"\w+Error\b", why):  # of another library: the names say what is missing
        return re.sub(r"\d+", "N", why)
    text = re.sub(r"\([^()]*\)|\[[^\[\]]*\]|'[^']*'", "", why)
    text = re.sub(r"\b[A-Za-z_]+(?:\.\w+)+\b", "NAME", text)
    text = re.sub(r"\b(?:[A-Z]\w*[a-z]\w*[A-Z]\w*|\w*For[A-Z]\w+|\w+Model)\b", "CLASS", text)
    text = re.sub(r"-?\d[\d.,]*(?:e[-+]?\d+)?", "N", text)
    return text.partition("; its stacks are")[0].partition("module lists:")[0].strip()


def _cell(why: str, most: int = 240) -> str:
    text = why.replace("|", "/").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return text if len(text) <= most else text[:most].rstrip(" \\") + " ..."


def _named(kinds: Iterable[str], most: int = 40) -> str:
    names = [f"`{kind}`" for kind in kinds]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
