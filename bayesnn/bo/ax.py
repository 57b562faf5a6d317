"""Any model of this library in Ax: its configuration, a generation strategy around it, and what Ax's storage must know.

Ax keeps the experiment, makes its own start, chooses the acquisition function and optimises it; the surrogate is ours.
Importing this module is enough for Ax to save and load experiments that use it. Needs the extra ``ax``.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from botorch.models.model import Model as BotorchModel
from botorch.models.transforms.input import InputTransform
from botorch.posteriors import Posterior
from botorch.sampling.base import MCSampler
from botorch.utils.datasets import SupervisedDataset
from torch import Tensor

from bayesnn.bo.acquisition import draws_are_functions
from bayesnn.bo.auto import AutoSurrogate
from bayesnn.checks import count
from bayesnn.configured import build, describe
from bayesnn.data import BayesnnWarning
from bayesnn.model import Model
from bayesnn.registry import surrogate as surrogate_by_name

try:
    from ax.api.utils.generation_strategy_dispatch import choose_generation_strategy
    from ax.api.utils.structs import GenerationStrategyDispatchStruct
    from ax.generation_strategy.generation_strategy import GenerationStrategy
    from ax.generators.torch.botorch_modular.surrogate import ModelConfig
    from ax.generators.torch.botorch_modular.utils import fit_botorch_model
    from ax.storage.botorch_modular_registry import register_model
except ImportError as error:
    raise ImportError(f'bayesnn.bo.ax needs Ax 1.3: pip install "bayesnn[ax]" ({error})') from error


def generation_strategy(surrogate: str | Model = "nngp", *, num_startup: int = 5, seed: int = 0) -> GenerationStrategy:
    """The way Ax finds trials, with a surrogate of this library: the center, a Sobol sequence, then the surrogate.

    Everything else is Ax's default: noisy expected improvement (``qLogNEI``, for several objectives ``qLogNEHVI``), weighed by
    the probability that outcome constraints are kept; running trials are pending. Where workers ask for more trials than
    ``num_startup`` before half of those have finished, the Sobol sequence goes on.

    Args:
        surrogate: as in :func:`model_config`.
        num_startup: trials before the surrogate, the center and those attached by hand included; 5 is Ax's own number.
        seed: of the Sobol sequence and of each fit. Ax's own random draws follow ``Client(random_seed=…)``.

    Raises:
        TypeError, ValueError: for a surrogate that there isn't or that can't be saved, and numbers that make no sense.

    Example:
        >>> client = Client()
        >>> client.configure_experiment(parameters=[RangeParameterConfig("x", (0.0, 1.0), "float")])
        >>> client.configure_optimization("-loss")
        >>> client.set_generation_strategy(bayesnn.bo.ax.generation_strategy("nngp"))
        >>> for index, x in client.get_next_trials(max_trials=3).items():
        ...     client.complete_trial(index, {"loss": loss(x)})
    """
    struct = GenerationStrategyDispatchStruct(
        method="custom",
        initialization_budget=count("num_startup", num_startup),
        initialization_random_seed=count("seed", seed, least=0),
        allow_exceeding_initialization_budget=True,
    )
    return choose_generation_strategy(struct, model_config=model_config(surrogate, seed=seed))


def model_config(surrogate: str | Model = "nngp", *, seed: int = 0) -> ModelConfig:
    """A surrogate of this library as Ax's ``ModelConfig``, for generation strategies of your own.

    Each outcome gets a model of its own. What Ax saves is how the model is built, as JSON; it is fitted again after loading.

    Args:
        surrogate: a name among ``bayesnn.surrogates()``; or "auto", the one of several that predicts best
            (:class:`AutoSurrogate`); or an unfitted model, whose inputs will be in the unit cube.
        seed: of each fit.

    Raises:
        TypeError, ValueError: for a surrogate that there isn't, or a model with parts that can't be saved.

    Example:
        >>> SurrogateSpec(model_configs=[model_config("nngp")])
    """
    if isinstance(surrogate, str):
        name = surrogate
        if surrogate != "auto":
            surrogate_by_name(surrogate)
    elif isinstance(surrogate, Model):
        name = type(surrogate).__name__
    else:
        raise TypeError(f"surrogate must be a name or an unfitted bayesnn model, found {type(surrogate).__name__}")
    options = {"surrogate": describe(surrogate), "seed": count("seed", seed, least=0)}
    return ModelConfig(botorch_model_class=SurrogateModel, model_options=options, name=name)


class SurrogateModel(BotorchModel):
    """A surrogate of this library in the form that Ax builds BoTorch models in: from data, fitted at once.

    It has no parameters that could be loaded without data, so that each fold of Ax's cross-validation is a fit of its own.

    Args:
        train_X: inputs (n, d) in Ax's numbers.
        train_Y: outcomes (n, m).
        surrogate: a name, "auto", or a model as :func:`bayesnn.configured.describe` writes it.
        seed: of the fit.
        input_transform: from Ax's numbers to the unit cube.

    Raises:
        TypeError: for a model whose draws depend on the points asked for: Ax doesn't know for which acquisition functions
            those are right; ``bayesnn.bo.suggest`` does.
    """

    # Not keyword-only: Ax looks for ``input_transform`` among the positional arguments.
    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        surrogate: Any,
        seed: int = 0,
        input_transform: InputTransform | None = None,
    ) -> None:
        super().__init__()
        self._inputs, self._transform = train_X, input_transform
        with warnings.catch_warnings():
            # A category that hasn't been tried yet is a constant column, nothing to tell the user about at each trial.
            warnings.filterwarnings("ignore", message="X: column", category=BayesnnWarning)
            self._take(_fitted(surrogate, self._features(train_X), train_Y, seed))
        if not draws_are_functions(self.surrogate):
            raise TypeError(
                f"the draws of this {type(self.surrogate).__name__} depend on the points asked for, so that Ax's acquisition "
                "functions aren't right for it: use bayesnn.bo.suggest or SurrogateSampler"
            )

    @classmethod
    def construct_inputs(cls, training_data: SupervisedDataset, **options: Any) -> dict[str, Any]:
        """The constructor's arguments for one of Ax's data sets; ``options`` are a ``ModelConfig``'s.

        Raises:
            TypeError: for tasks, fidelities and categories that Ax hasn't turned into numbers, which no surrogate here has.
        """
        unknown = sorted(set(options) - {"surrogate", "seed"})
        if unknown:
            raise TypeError(f"bayesnn's surrogates in Ax have no {', '.join(unknown)}")
        if training_data.Yvar is not None:
            warnings.warn(
                f"the standard errors told for {', '.join(training_data.outcome_names)} are left aside: the surrogate learns "
                "the noise from the outcomes",
                BayesnnWarning,
                stacklevel=2,
            )
        return {"train_X": training_data.X, "train_Y": training_data.Y} | options

    @property
    def surrogate(self) -> Model:
        """The fitted surrogate; its inputs are in the unit cube."""
        return self._fitted[0]

    def _take(self, surrogate: Model) -> None:
        # In a tuple, so that its tensors aren't this module's: Ax would load them into a model of other data.
        self._fitted = (surrogate,)

    def _features(self, X: Tensor) -> Tensor:
        return X if self._transform is None else self._transform(X)

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """In Ax's numbers, (n, d)."""
        return (self._inputs,)

    @property
    def train_targets(self) -> Tensor:
        """The outcomes (n, m)."""
        return self.surrogate.train_targets

    @property
    def num_outputs(self) -> int:
        return self.surrogate.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        return self.surrogate.batch_shape

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """As :meth:`bayesnn.Model.posterior`, at Ax's numbers."""
        posterior: Any = self.surrogate.posterior(self._features(X), output_indices, observation_noise)
        return posterior if posterior_transform is None else posterior.transformed(posterior_transform, X)

    def subset_output(self, idcs: list[int]) -> Self:
        """The same fitted model, with some of its outputs only."""
        return self._with(self.surrogate.subset_output(idcs), self._inputs)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """As :meth:`bayesnn.Model.condition_on_observations`, at Ax's numbers."""
        return self._with(self.surrogate.condition_on_observations(self._features(X), Y, **kwargs), self._inputs)

    def fantasize(self, X: Tensor, sampler: MCSampler, **kwargs: Any) -> Self:
        """As :meth:`bayesnn.Model.fantasize`, at Ax's numbers."""
        return self._with(self.surrogate.fantasize(self._features(X), sampler, **kwargs), self._inputs)

    def _with(self, surrogate: Model, inputs: Tensor) -> Self:
        twin = type(self).__new__(type(self))
        BotorchModel.__init__(twin)
        twin._inputs, twin._transform = inputs, self._transform
        twin._take(surrogate)
        return twin.eval()


def _fitted(described: Any, X: Tensor, Y: Tensor, seed: int) -> Model:
    if described == "auto":
        return AutoSurrogate()(X, Y, seed)
    model = surrogate_by_name(described) if isinstance(described, str) else build(described)
    return model.fit(X, Y, seed=seed)


@fit_botorch_model.register(SurrogateModel)
def _fit_botorch_model(model: SurrogateModel, **_: Any) -> None:
    """Nothing is left to do: it was fitted when it was built."""


register_model(SurrogateModel)
