"""What is written down of a trial at once: one transaction instead of one for each parameter and attribute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

_tables: Any
try:
    from optuna.storages._rdb import models as _tables
except ImportError:  # they are private: without them, everything is written one by one
    _tables = None


def write(
    storage: BaseStorage,
    trial_id: int,
    attributes: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    distributions: Mapping[str, BaseDistribution] | None = None,
) -> None:
    """Write user attributes and parameters of a running trial.

    In a database of Optuna's that is one transaction, which costs as much as one attribute does otherwise; in other storages,
    and where something of it has been written before, they are written one by one.

    Args:
        storage: the study's.
        trial_id: the trial's, in that storage.
        attributes: JSON values by name.
        params: values by name.
        distributions: of each of these.
    """
    internal = {name: (distributions or {})[name].to_internal_repr(value) for name, value in (params or {}).items()}
    engine = None if _tables is None else engine_of(storage)
    if engine is not None and _all_at_once(engine, trial_id, attributes, internal, distributions or {}):
        return
    for name, value in internal.items():
        storage.set_trial_param(trial_id, name, value, (distributions or {})[name])
    for name, value in attributes.items():
        storage.set_trial_user_attr(trial_id, name, value)


def engine_of(storage: BaseStorage) -> Engine | None:
    """The database behind a storage of Optuna's, cached or not; None for any other storage."""
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    return engine if isinstance(engine, Engine) else None


def _all_at_once(
    engine: Engine,
    trial_id: int,
    attributes: Mapping[str, Any],
    internal: Mapping[str, float],
    distributions: Mapping[str, BaseDistribution],
) -> bool:
    """Whether that could be done: the trial is running, and has none of it yet."""
    params = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": value,
            "distribution_json": distribution_to_json(distributions[name]),
        }
        for name, value in internal.items()
    ]
    texts = [{"trial_id": trial_id, "key": name, "value_json": json.dumps(value)} for name, value in attributes.items()]
    try:
        with engine.begin() as connection:
            state = connection.execute(
                select(_tables.TrialModel.state).where(_tables.TrialModel.trial_id == trial_id)
            ).scalar()
            if state is not TrialState.RUNNING:
                return False
            if params:
                connection.execute(insert(_tables.TrialParamModel), params)
            if texts:
                connection.execute(insert(_tables.TrialUserAttributeModel), texts)
    except IntegrityError:
        return False
    return True
