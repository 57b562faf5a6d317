"""Batches for studies whose evaluations run side by side: several trials at once, suggested jointly."""

from __future__ import annotations

import optuna
from optuna.study import Study
from optuna.trial import Trial, TrialState

from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.study import configuration_of
from bayesnn.checks import count


def ask(study: Study, n: int) -> list[Trial]:
    """Begin n trials whose configurations are suggested as one batch.

    What is queued in the study (``enqueue_trial``, trials that were cut off) comes first. Of the others, each is the best
    given those before it, from one fit of the surrogate. They are in the study as running at once, with their
    parameters, so that all other workers know of them; evaluate them in any order and ``study.tell(trial, value)``.

    Args:
        study: with a ``SurrogateSampler`` that knows the space, or finished trials that show it.
        n: how many.

    Returns:
        Running trials; ``trial.params`` is the configuration.

    Raises:
        TypeError: if the study has another sampler, or n isn't an integer.
        ValueError: if the space isn't known, or n isn't positive.

    Example:
        >>> study = optuna.create_study(sampler=SurrogateSampler("nngp", space=space))
        >>> for trial in ask(study, 4):
        ...     study.tell(trial, f(trial.params))
    """
    count("n", n)
    if not isinstance(study, Study):
        raise TypeError(f"study must be an Optuna study, found {type(study).__name__}")
    sampler = study.sampler
    if not isinstance(sampler, SurrogateSampler):
        raise TypeError(f"study must have a SurrogateSampler, found {type(sampler).__name__}")
    space = sampler.space
    if space is None:
        found = sampler.infer_relative_search_space(study, optuna.create_trial(state=TrialState.RUNNING))
        if not found:
            raise ValueError(
                "study must have finished trials that show the space, or a sampler that was given it: space=…"
            )
        space = Space.from_distributions(found)
    begun: list[Trial] = []
    while len(begun) < n and study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        begun.append(study.ask())
        configuration_of(begun[-1], space)
    if len(begun) == n:
        return begun
    number = len(study.get_trials(deepcopy=False))
    for configuration, record in sampler.answers(study, space, number, n - len(begun)):
        distributions = space.distributions()
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=configuration,
            distributions={name: distributions[name] for name in configuration},
            user_attrs=record,
        )
        begun.append(Trial(study, study._storage.create_new_trial(study._study_id, template)))
    return begun
