"""Tests, a folder a floor; `tests.support` makes the models and adapters that they use, and the oracle."""
