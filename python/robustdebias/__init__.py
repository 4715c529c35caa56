"""Group-robust fine-tuning of masked language models across demographics, and what it does to their bias.

An application of :mod:`rd_kernels`; ``robustdebias --help`` shows it from the command line. Importing this
imports neither torch nor transformers.
"""
