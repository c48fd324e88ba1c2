"""What is wrong with a configuration, said so that the reader can mend it.

Pydantic's findings become one or two lines each: the key, the value, where it was written, what
was wanted, and for an unknown key the nearest known one. All findings are reported together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from vlactl.config.layers import Leaf, Tree, look_up, origin_of, plain
from vlactl.config.schema import SECTION_KINDS
from vlactl.errors import ConfigError

_WANTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "text; quote it, as in --set 'key=\"2026\"'",
}
_LONGEST_VALUE = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and how to mend it."""

    text: str
    hint: str = ""


def explain(findings: Sequence[ErrorDetails], tree: Tree, keys: Sequence[str]) -> ConfigError:
    """One error for all findings; `keys` are the dotted keys that exist."""
    left_over = {section: _left_over(section, findings, tree) for section in SECTION_KINDS}
    stale = {key for names in left_over.values() for key in names}
    problems = [_switched(section, tree, names) for section, names in left_over.items() if names]
    for finding in findings:
        if look_up(tree, finding["loc"])[0] not in stale:
            problems.append(_problem(finding, tree, keys))
    if len(problems) == 1:
        return ConfigError(problems[0].text, hint=problems[0].hint)
    lines = [f"{len(problems)} problems"]
    for problem in problems:
        lines.extend([f"- {problem.text}", *(f"  {line}" for line in problem.hint.splitlines())])
    return ConfigError("\n".join(lines))


def render(value: object) -> str:
    """A value as messages and tables show it: JSON, cut when it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _problem(finding: ErrorDetails, tree: Tree, keys: Sequence[str]) -> Problem:
    key, node = look_up(tree, finding["loc"])
    source = f" (from {origin_of(node)})" if origin_of(node) else ""
    if finding["type"] == "extra_forbidden":
        return Problem(f'unknown key "{key}"{source}', _unknown_key_hint(key, keys))
    if finding["type"] == "missing":
        return Problem(f'key "{key}" is not set', f"--set {key}=...")
    value = f" = {render(node.value)}" if isinstance(node, Leaf) else _table(node)
    return Problem(f"{key}{value}{source}: {_complaint(finding)}")


def _complaint(finding: ErrorDetails) -> str:
    if finding["type"] in _WANTED:
        return f"wanted {_WANTED[finding['type']]}"
    message = finding["msg"].removeprefix("Value error, ")
    rest = message.removeprefix("Input should be ")
    return message if rest == message else f"wanted {rest.partition(', unable')[0]}"


def _table(node: Tree | Leaf | None) -> str:
    return f" = {render(plain(node))}" if isinstance(node, dict) and len(node) == 1 else ""


def _unknown_key_hint(key: str, keys: Sequence[str]) -> str:
    section = key.rpartition(".")[0]
    siblings = {known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == section}
    if not section:
        siblings = {known.partition(".")[0] for known in keys}
    near = nearest_key(key, [*keys, *siblings] if not section else keys)
    parts = [f'did you mean "{near}"?'] * bool(near)
    parts += [f"keys: {', '.join(sorted(siblings))}"] * bool(siblings)
    return "       ".join(parts)


def nearest_key(key: str, keys: Sequence[str]) -> str:
    """The known key that was most likely meant: a similar spelling, or the same word elsewhere."""
    word = key.rpartition(".")[2].replace("-", "_")
    similar = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    same_word = [known for known in keys if known.rpartition(".")[2] == word]
    return next(iter([*similar, *same_word]), "")


# --------------------------------------------------------------------------------------------
# A section whose plugin was switched by a higher layer
# --------------------------------------------------------------------------------------------
def _left_over(section: str, findings: Sequence[ErrorDetails], tree: Tree) -> list[str]:
    """Faulty keys of a section that were written for the plugin it had before."""
    _, choice = look_up(tree, (section, "name"))
    if not isinstance(choice, Leaf) or _former(choice) is None:
        return []
    found = [look_up(tree, finding["loc"]) for finding in findings]
    return [
        key
        for key, node in found
        if key.startswith(f"{section}.") and _file(origin_of(node)) != _file(choice.origin)
    ]


def _switched(section: str, tree: Tree, keys: Sequence[str]) -> Problem:
    _, choice = look_up(tree, (section, "name"))
    assert isinstance(choice, Leaf)
    former, kind = _former(choice), SECTION_KINDS[section]
    names = ", ".join(key.removeprefix(f"{section}.") for key in dict.fromkeys(keys))
    return Problem(
        f'{section}.name = "{choice.value}" (from {choice.origin}) does not fit what the preset '
        f'says for "{former}": {names}',
        f'start from a preset whose {kind} is "{choice.value}" instead: vlactl presets list',
    )


def _former(choice: Leaf) -> object:
    """The plugin that a lower layer had chosen, or None when it is still the same."""
    replaced = choice.replaced
    while replaced is not None and replaced.value == choice.value:
        replaced = replaced.replaced
    return replaced.value if replaced else None


def _file(origin: str) -> str:
    """An origin without its line."""
    return origin.rpartition(":")[0] or origin
