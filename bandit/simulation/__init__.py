"""Adaptation policies against a modelled world: drifting traffic, drafters that learn and forget, every cost charged.

Nothing here is measured on a machine; the world's numbers (:mod:`~specblock.bandit.simulation.curves`) are.
"""
