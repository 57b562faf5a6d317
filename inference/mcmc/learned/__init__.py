"""Metropolis–Hastings with proposals that were learned beforehand on a distribution of models."""

from bayesnn.inference.mcmc.learned.meta_training import Examples, ProposalTarget, ProposalTraining, grid_blocks
from bayesnn.inference.mcmc.learned.models import Block, Grid, Model
from bayesnn.inference.mcmc.learned.proposal import BlockProposal
from bayesnn.inference.mcmc.learned.sampler import BlockMetropolis, BlockTarget, SingleSiteGibbs

__all__ = [
    "Block",
    "BlockMetropolis",
    "BlockProposal",
    "BlockTarget",
    "Examples",
    "Grid",
    "Model",
    "ProposalTarget",
    "ProposalTraining",
    "SingleSiteGibbs",
    "grid_blocks",
]
