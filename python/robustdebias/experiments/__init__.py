"""Experiments: methods x seeds x groupings from one configuration, their statistics, and the bias card."""
