"""What a provider did of a stage and what it left to the CPU, as counted in ONNX Runtime's profile.

This module reads profiles and puts the result into sentences.  It does not run anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitonnx.runtime.engine.providers import PROVIDERS

_MOST_KINDS = 6
"""Most kinds of operators that a sentence names."""
_CPU = PROVIDERS["cpu"].runtime_name


@dataclass(frozen=True, kw_only=True)
class StagePlacement:
    """Where the nodes of one stage run.

    ``reason`` says why the whole stage runs on the CPU; it is empty if the provider runs it.  Then
    ``left`` counts the nodes that run on the CPU nevertheless, by operator.  ``seconds`` is the
    duration of a run, and ``cpu_seconds`` the part of it that was spent on the CPU's nodes; both
    are 0 until the stage has run twice, because the first run is slower than all others.
    """

    stage: str
    reason: str = ""
    left: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def describe(self, provider: str) -> str:
        """Return a sentence about this stage."""
        return Placement(provider=provider, stages=(self,)).describe()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the stages run that ran so far: on the provider, or on the CPU."""

    provider: str
    stages: Sequence[StagePlacement]

    @property
    def left(self) -> Mapping[str, int]:
        """Return how many nodes run on the CPU, by operator, in stages that the provider runs."""
        return dict(sum((Counter(stage.left) for stage in self.stages), Counter()).most_common())

    @property
    def cpu_share(self) -> float | None:
        """Return the share of the time that the CPU's nodes take, or ``None`` if it is unknown."""
        seconds = sum(stage.seconds for stage in self.stages)
        return sum(stage.cpu_seconds for stage in self.stages) / seconds if seconds else None

    def summarize(self) -> dict[str, Any]:
        """Return the same as :meth:`describe` for programs: values that JSON has."""
        return {
            "provider": self.provider,
            "sentence": self.describe(),
            "cpu_share": self.cpu_share,
            "stages": [
                {"stage": stage.stage, "reason": stage.reason, "left": dict(stage.left)}
                for stage in self.stages
            ],
        }

    def describe(self) -> str:
        """Return one line that says what is left to the CPU, why, and how much time it takes."""
        whole = [stage for stage in self.stages if stage.reason]
        others = [f"'{stage.stage}'" for stage in self.stages if not stage.reason]
        parts = [f"all of '{stage.stage}', because {stage.reason}" for stage in whole]
        if left := self.left:
            kinds = [f"{count} {kind}" for kind, count in left.items()]
            named = ", ".join(kinds[:_MOST_KINDS]) + (", ..." if kinds[_MOST_KINDS:] else "")
            count = sum(left.values())
            nodes = f"{count} {'node' if count == 1 else 'nodes'}"
            parts.append(f"{nodes} of {', '.join(others)} ({named})")
        if not parts:
            return f"the provider {self.provider} runs every node of {', '.join(others)}"
        share = self.cpu_share
        time = "" if share is None else f"; these take {share:.0%} of the time"
        return f"the provider {self.provider} leaves to the CPU: {'; '.join(parts)}{time}"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The nodes that ran on the CPU in the last run, by operator, and their share of the time."""

    left: Mapping[str, int]
    share: float


def read_profile(text: bytes) -> Profile:
    """Read the profile that ONNX Runtime wrote of a session, and return that of its last run."""
    events = json.loads(text)
    runs = [e for e in events if e.get("cat") == "Session" and e["name"] == "model_run"]
    since = max((run["ts"] for run in runs), default=0)
    nodes = {"": 0}
    left: dict[str, str] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") != "Node" or event["ts"] < since or not about.get("provider"):
            continue
        here = about["provider"]
        nodes[here] = nodes.get(here, 0) + event["dur"]
        if here == _CPU:
            left[event["name"]] = about.get("op_name", "")
    total = sum(nodes.values())
    share = nodes.get(_CPU, 0) / total if total else float(bool(left))
    return Profile(left=dict(Counter(left.values()).most_common()), share=share)
