"""Metropolis–Hastings with proposals that were learned beforehand on a distribution of models."""

from bayesnn.inference.mcmc.learned.continuous import MixtureConditional, MixtureField
from bayesnn.inference.mcmc.learned.discrete import DiscreteConditional, Grid
from bayesnn.inference.mcmc.learned.examples import Examples, GridBlocks, MixtureBlocks
from bayesnn.inference.mcmc.learned.meta_training import ProposalTarget, ProposalTraining
from bayesnn.inference.mcmc.learned.models import Block, BlockDistribution, Conditional, Model
from bayesnn.inference.mcmc.learned.proposal import BlockProposal
from bayesnn.inference.mcmc.learned.sampler import BlockMetropolis, Gibbs
from bayesnn.inference.mcmc.learned.target import BlockTarget, Proposal

__all__ = [
    "Block",
    "BlockDistribution",
    "BlockMetropolis",
    "BlockProposal",
    "BlockTarget",
    "Conditional",
    "DiscreteConditional",
    "Examples",
    "Gibbs",
    "Grid",
    "GridBlocks",
    "MixtureBlocks",
    "MixtureConditional",
    "MixtureField",
    "Model",
    "Proposal",
    "ProposalTarget",
    "ProposalTraining",
]
