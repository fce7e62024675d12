"""The doctor: checks on any checkpoint that training and decoding agree, or names the first place where they do not.

    python -m tidal.doctor runs/addition

    report = tidal.doctor.run(model, tokenizer, texts=["…"], quick=True)
    assert report.ok, report.table()

examine.py    runs the checks                    oracle.py     layout and model a second time, the definition
patient.py    what is examined                   tape.py       what a model is fed, what its layers give
registry.py   the list of checks                 texts.py      hostile strings, what a run was trained on
report.py     measures, verdicts, the table      recipes.py    what training feeds, and what it was made of
feeding.py    what a model must be fed           batches.py    rows that come and go
checks_*.py   the checks, by number in docs/doctor.md
specimen.py   small random models to examine
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidal.lazy import exports

if TYPE_CHECKING:
    from tidal.doctor.examine import examine_checkpoint as examine_checkpoint
    from tidal.doctor.examine import run as run
    from tidal.doctor.patient import Document as Document
    from tidal.doctor.report import Report as Report
    from tidal.doctor.report import Result as Result
    from tidal.doctor.report import Where as Where

__getattr__, __dir__ = exports(__name__, {
    "Document": "tidal.doctor.patient",
    "Report": "tidal.doctor.report",
    "Result": "tidal.doctor.report",
    "Where": "tidal.doctor.report",
    "examine_checkpoint": "tidal.doctor.examine",
    "run": "tidal.doctor.examine",
})
