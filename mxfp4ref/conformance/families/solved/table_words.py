"""A solved table and the rules that give it, as a sentence: the rule if it is the only one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from mxfp4ref.conformance.families.hypothesis import Hypothesis

__all__ = ["beside_a_table", "by_table", "own_words", "table_and_rules"]

_RULES = 3  # that are told


def table_and_rules(found: Sequence[Hypothesis]) -> tuple[Hypothesis | None, list[str]]:
    """The table of the first one's kind, None if there is none, and the rules of this kind, in words."""
    kind = found[0].kind
    table = next((h for h in found if h.table and h.kind == kind), None)
    rules = list(dict.fromkeys(h.words for h in found if h.kind == kind and not h.table)) if table else []
    return table, [w for w in rules if not any(w != r and w.startswith(r) for r in rules)]


def by_table(table: Hypothesis, rules: Sequence[str]) -> str:
    """The rule with the table, or the table with the rules that it does not tell apart."""
    if len(rules) == 1:
        return f"{rules[0]}; {own_words(table.words, table.kind)}"
    if not rules:
        return table.words
    told = "; or ".join(own_words(rule, table.kind) for rule in rules[:_RULES])
    more = f"; and {len(rules) - _RULES} more" if len(rules) > _RULES else ""
    return f"{table.words} (rules that give this: {told}{more})"


def beside_a_table(found: Sequence[Hypothesis], kind: str, rules: Sequence[str]) -> list[Hypothesis]:
    """Hypotheses without the tables and rules of a kind, and of the tables of each other kind the first one."""
    others = [h for h in found if not h.words.startswith(tuple(rules))]
    tables = {h.kind: h for h in reversed(others) if h.table and h.kind != kind}
    return [h for h in others if not h.table or tables.get(h.kind) is h]


def own_words(words: str, kind: str) -> str:
    """What is said beside the kind, with which it begins."""
    pairs = zip(words.split(), kind.split(), strict=False)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0].rstrip(":") == pair[1], pairs))
    return " ".join(words.split()[alike:]) or words
