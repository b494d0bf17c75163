"""The black-box outer loop: any field of a recipe searched with Optuna, a checkpointed run a trial.

Nothing is imported here: `bilevel.search.commands` is the command, `bilevel.search.space` the language of
search spaces, and optuna is loaded by the modules that use it.
"""
