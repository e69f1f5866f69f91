"""Storage, sampler and pruner of a study: Optuna's classes by name."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.pruners import SuccessiveHalvingPruner as Halving
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    SQLAlchemyError,
)

from selftune.search._journal import opened

log = logging.getLogger("selftune")

BEAT, GRACE, RETRIES = 30, 120, 2
"""Heartbeat interval and grace period in seconds, and number of retries of a stale trial."""
AWAY, PAUSE = 60, 0.2
"""Seconds for which a database may be unreachable, and seconds between attempts."""
T = TypeVar("T")
PRUNERS = ("asha", "hyperband", "median", "none")


def storage_of(given: Any) -> BaseStorage:
    """A storage, from a path (a journal), a URL, or one of Optuna's.

    URLs are ``grpc://host:port`` or those of databases; None is a storage in memory.
    """
    if given is None:
        return InMemoryStorage()
    if isinstance(given, BaseStorage):
        return given
    text = str(given)
    if "://" in text:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return _remote(text)
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = opened(path)
    try:
        return JournalStorage(JournalFileBackend(text, lock_obj=lock))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"storage={path} is damaged ({type(error).__name__}: {error}): restore it from a copy, "
            "or pass another path; the file is untouched"
        ) from error


class _Database(RDBStorage):
    """Optuna's storage in a database, whose heartbeats survive a lost connection."""

    def record_heartbeat(self, trial_id: int) -> None:
        # In a thread, which would end with the first error: the trial would seem dead.
        persist(partial(super().record_heartbeat, trial_id))


def _remote(address: str) -> BaseStorage:
    """A storage by its URL."""
    if address.startswith("grpc://"):
        host, _, port = address.removeprefix("grpc://").partition(":")
        if not (port or "0").isdecimal():
            raise ValueError(f"storage={address}: {port!r} is no port: pass grpc://host:13000")
        return GrpcStorageProxy(host=host, port=int(port or 13000))
    again = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
    try:
        return _Database(
            address, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=BEAT,
            grace_period=GRACE, heartbeat_stale_trial_callback=again,
        )  # fmt: skip
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(
            f"storage={address} is no address of a database ({error}): pass a path, or one like "
            "sqlite:///study.db or postgresql://user@host/name"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"storage={address} needs a database driver that is not installed "
            f"({error.__context__}); for PostgreSQL: pip install 'selftune[postgres]'"
        ) from error
    except DatabaseError as error:
        if transient(error):
            raise
        raise ValueError(
            f"storage={address} cannot be opened ({error.orig}): if another program has locked it, "
            "wait for that program or pass another URL; the database is unchanged"
        ) from error


MAKING = "create table", "create type", "alembic_version", "version_info"
"""Words in the statements with which Optuna creates its tables and stores their version."""


def persist(call: Callable[[], T], study: optuna.Study | None = None) -> T:
    """Call a function, and retry after transient database errors, for ``AWAY`` seconds at most."""
    until = math.inf
    while True:
        try:
            if study is not None and until < math.inf:
                study._storage.remove_session()
                study.get_trials(deepcopy=False)
                until = math.inf  # it answers
            return call()
        except Exception as error:
            why = transient(error)
            if why is None:
                raise
            until = min(until, time.monotonic() + AWAY)
            if time.monotonic() > until:
                raise
            log.warning("storage: %s; trying again", why)
            time.sleep(PAUSE)


def transient(error: BaseException | None) -> str | None:
    """The transient cause of an error: a lost connection, or tables another worker creates."""
    while error is not None:
        if isinstance(error, DBAPIError):
            statement = str(error.statement).lower()
            making = any(words in statement for words in MAKING)
            racing = isinstance(error, IntegrityError) or "already exists" in str(error.orig)
            if error.connection_invalidated or (making and racing):
                return str(error.orig).strip()
        error = error.__cause__ or error.__context__
    return None


def check_sampler(given: Any, storage: Any, *, trust_storage: bool) -> None:
    """Raise an error for a sampler that unpickles data of an untrusted storage."""
    unpickles = given == "cmaes" or _holds_cmaes(given)
    private = storage is None or isinstance(storage, InMemoryStorage)
    if unpickles and not trust_storage and not private:
        raise ValueError(
            f"sampler={given!r} with storage={storage}: Optuna's CMA-ES unpickles its state from "
            "the storage, so whoever can write there can run code here. Pass trust_storage=True "
            "if nobody else can, or another sampler"
        )


def _holds_cmaes(sampler: Any) -> bool:
    """Whether a sampler is Optuna's CMA-ES, or has it inside, such as ``PartialFixedSampler``."""
    inner = vars(sampler).values() if isinstance(sampler, BaseSampler) else ()
    return isinstance(sampler, CmaEsSampler) or any(map(_holds_cmaes, inner))


def sampler_of(given: Any, seed: int) -> BaseSampler:
    """A sampler by name, or one of Optuna's."""
    if isinstance(given, BaseSampler):
        return given
    kinds: dict[str, Callable[..., BaseSampler]] = {
        "grid": BruteForceSampler,
        "random": RandomSampler,
        "tpe": partial(TPESampler, multivariate=True, group=True, constant_liar=True),
        "gp": GPSampler,
        "cmaes": partial(CmaEsSampler, warn_independent_sampling=False),
    }
    if given not in kinds:
        raise ValueError(f"sampler={given!r} must be one of {[*kinds]} or an Optuna sampler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kinds[given](seed=seed)


def pruner_of(given: Any) -> BasePruner:
    """A pruner by name, or one of Optuna's; its resource is the number of evaluations."""
    if isinstance(given, BasePruner):
        return given
    if given == "asha":
        return Halving(min_resource=3, reduction_factor=3)
    if given == "hyperband":
        return HyperbandPruner(min_resource=1)
    if given == "median":
        return MedianPruner()
    if given in (None, "none"):
        return NopPruner()
    raise ValueError(f"pruner={given!r} must be one of {PRUNERS} or an Optuna pruner")


@contextmanager
def quiet() -> Iterator[None]:
    """Log only Optuna's errors; other messages are logged for each candidate."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


class Unwritable(BaseException):
    """A storage failed inside a trial; not an Exception, which Optuna would catch."""


@contextmanager
def writable(storage: Any, write: Callable[[], object]) -> Iterator[None]:
    """Raise a clear error if a search ends because its storage cannot be written to.

    Optuna raises many types of errors for this; if another cause is possible, a write is tried:
    ``write`` writes a value to the storage that it already contains.
    """
    try:
        yield
    except (OSError, AssertionError, Unwritable, StorageInternalError, SQLAlchemyError) as error:
        why: BaseException = error
        if isinstance(error, (OSError, AssertionError)):
            try:
                write()
            except (OSError, StorageInternalError, SQLAlchemyError) as again:
                why = again
            else:
                raise
        while why.__cause__ is not None:
            why = why.__cause__
        raise OSError(
            f"storage={storage} cannot be written to ({why}): free space there, or pass another "
            "one; its trials are kept"
        ) from error


def open_study(
    storage: BaseStorage, name: str, sampler: BaseSampler, pruner: BasePruner, about: dict[str, Any]
) -> optuna.Study:
    """Create a study, or continue one; settings in ``about`` make its trials comparable."""
    direction = about["direction"]
    try:
        with quiet():
            study = optuna.create_study(
                storage=storage, study_name=name, sampler=sampler, pruner=pruner,
                direction=direction, load_if_exists=True,
            )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"study={name!r}: {error}; pass another name or storage") from error
    known = study.user_attrs.get("selftune")
    if known is None:
        if study.trials:
            raise ValueError(
                f"study={name!r} has {len(study.trials)} trials of another program: pass another "
                "name or storage"
            )
        study.set_user_attr("selftune", about)
    elif known != about:
        different = {
            k: (known.get(k), about.get(k))
            for k in {**known, **about}
            if known.get(k) != about.get(k)
        }
        described = "; ".join(f"{k}: there {a}, here {b}" for k, (a, b) in different.items())
        raise ValueError(
            f"study={name!r} belongs to another search ({described}): pass another study= or "
            "storage="
        )
    return study


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
