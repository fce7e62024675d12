"""The doctor: proves on any checkpoint that training and decoding agree, or names the first place where they do not.

    python -m tidal.doctor runs/addition

    report = tidal.doctor.run(model, tokenizer, texts=["…"], quick=True)
    assert report.ok, report.table()

examine.py    runs the checks                    oracle.py     layout and model a second time, the definition
patient.py    what is examined                   tape.py       what a model is fed, what its layers give
registry.py   the list of checks                 texts.py      hostile strings, what a run was trained on
report.py     measures, verdicts, the table      checks_*.py   the checks, by number in docs/doctor.md
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidal.doctor.examine import examine_checkpoint as examine_checkpoint
    from tidal.doctor.examine import run as run
    from tidal.doctor.patient import Document as Document
    from tidal.doctor.report import Report as Report
    from tidal.doctor.report import Result as Result
    from tidal.doctor.report import Where as Where

_HOMES = {
    "Document": "tidal.doctor.patient",
    "Report": "tidal.doctor.report",
    "Result": "tidal.doctor.report",
    "Where": "tidal.doctor.report",
    "examine_checkpoint": "tidal.doctor.examine",
    "run": "tidal.doctor.examine",
}


def __getattr__(name: str) -> Any:  # on first use, so that --help answers before torch is loaded
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tidal.doctor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
