"""What a service exposes at ``/metrics``, and what the page about it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

ROOT: Final = Path(__file__).parents[3]
PAGE: Final = ROOT / "docs" / "metrics.md"
ALERTS: Final = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboard.json"
_ROW: Final = re.compile(
    r"^\| `(cb_trade_\w+)` \| (\w+) \|([^|]*)\|([^|]+)\|([^|]+)\|$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Described:
    """A metric as Prometheus knows it."""

    kind: str
    labels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


class Exposed:
    """One answer of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        """Every metric, also one that has no sample yet, and its type."""
        self.samples: list[Sample] = []
        for family in text_string_to_metric_families(text):
            # When a counter or histogram was made, which the client library adds.
            if family.name.endswith("_created"):
                continue
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.kinds[name] = family.type
            self.samples += [
                Sample(sample.name, dict(sample.labels), sample.value) for sample in family.samples
            ]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 where there is none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"cb_trade_{name}" and labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> frozenset[str]:
        """The labels of a metric, as its samples have them."""
        names = {name, f"{name}_bucket"}
        return frozenset(
            label for sample in self.samples if sample.name in names for label in sample.labels
        ) - {"le"}


def documented() -> dict[str, Described]:
    """Every metric of the page."""
    return {
        name: Described(kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _, _ in _ROW.findall(PAGE.read_text())
    }


def used(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """The metrics that an expression names, each with the labels that it is asked by."""
    grouped = {
        label
        for group in re.findall(r"\bby\s*\(([^)]*)\)", expression)
        for label in re.findall(r"\w+", group)
    }
    for name, matchers in re.findall(r"\b(cb_trade_\w+)(\{[^}]*\})?", expression):
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        yield name, frozenset((grouped | asked) - {"le"})
