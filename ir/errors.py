"""Every mistake effc reports has a class here: what went wrong, the node, why, and the fix.

Errors name the user's own line first and ours second. They carry text only, so that they survive
pickling to another process and printing in any terminal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffcError(Exception):
    """Base of all errors raised on purpose.

    what: one sentence. The rest are optional lines of the same report.
    """

    def __init__(
        self,
        what: str,
        *,
        node: str | None = None,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        context: str | None = None,
    ) -> None:
        self.what, self.node, self.where = what, node, where
        self.why, self.fix, self.context = why, fix, context
        super().__init__(what)

    def __str__(self) -> str:
        rows = [("where", self.where), ("node", self.node), ("why", self.why), ("fix", self.fix)]
        text = "\n".join([self.what, *(f"  {key:<6}{value}" for key, value in rows if value)])
        return f"{text}\n{self.context}" if self.context else text


class OpError(EffcError, ValueError):
    """An op was built from operands or attributes that its declaration does not allow."""


class ParseError(EffcError, ValueError):
    """Text is not a graph: names the line and what was expected."""


class VerifyError(EffcError):
    """A graph breaks an invariant; `context` shows the nodes around the bad one."""


class RuleError(EffcError):
    """A rule threw or did not come to rest; names the rule and the node it was at."""


class PassError(EffcError):
    """A pass failed, or its needs are not met at its place in the pipeline."""


class PipelineError(EffcError, ValueError):
    """Pipeline text names an unknown pass or option, or cannot be read."""


class UnsupportedError(EffcError):
    """strict=True: lists every node that no kernel of the target claims."""


class InputError(EffcError, ValueError):
    """A compiled module was called with the wrong count, type, shape or device of inputs."""


class OptionError(EffcError, ValueError):
    """An unknown or ill-typed option of compile(); names the nearest known one."""


class ArtefactError(EffcError):
    """A compiled model cannot be saved, or a file is not an artefact that can be loaded here."""


class StepPlanError(EffcError, ValueError):
    """A step plan cannot be read, contradicts itself, or was made for another model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or all of them when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
