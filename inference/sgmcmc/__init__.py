"""Stochastic-gradient Markov chain Monte Carlo: sampling with minibatches and without an acceptance step."""
