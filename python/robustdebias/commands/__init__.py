"""The commands of `robustdebias`, one a file."""
