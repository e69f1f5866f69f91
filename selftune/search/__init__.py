"""Model selection with Optuna, in which each trial is a self-tuned run (extra ``search``)."""

try:
    import optuna as _optuna  # noqa: F401
except ImportError as error:
    raise ImportError("selftune.search needs optuna: pip install 'selftune[search]'") from error

from selftune.search import families
from selftune.search._candidates import Candidate
from selftune.search._ensemble import Ensemble
from selftune.search._result import Selection
from selftune.search._selecting import select
from selftune.search._shape import Shape, accuracy
from selftune.search._space import Space
from selftune.search.memory import Memory, Task, batch_for

__all__ = [
    "Candidate",
    "Ensemble",
    "Memory",
    "Selection",
    "Shape",
    "Space",
    "Task",
    "accuracy",
    "batch_for",
    "families",
    "select",
]
