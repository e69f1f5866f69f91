"""Inspection of a run: log, recorders, verdicts and reports."""

from selftune.monitor._base import AbstractRecorder, Row
from selftune.monitor._monitor import Monitor, hyper_rows, plain_rows
from selftune.monitor.agreement import Agreement
from selftune.monitor.axes import marks
from selftune.monitor.explanation import Course
from selftune.monitor.metrics import Metrics, verdict_rows
from selftune.monitor.recorders import (
    JSONL,
    InMemory,
    Listener,
    Several,
    as_recorder,
    read_jsonl,
)
from selftune.monitor.tensorboard import TensorBoard
from selftune.monitor.verdicts import Ends, Verdict, judge

__all__ = [
    "JSONL",
    "AbstractRecorder",
    "Agreement",
    "Course",
    "Ends",
    "InMemory",
    "Listener",
    "Metrics",
    "Monitor",
    "Row",
    "Several",
    "TensorBoard",
    "Verdict",
    "as_recorder",
    "hyper_rows",
    "judge",
    "marks",
    "plain_rows",
    "read_jsonl",
    "verdict_rows",
]
