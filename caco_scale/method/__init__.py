"""The method, CaCo (arXiv:2203.14370): the encoders, their moving average, and the bank of positives and negatives.

``bank.py`` is where the loss is and where the bank learns (it names the files beside it, ``in_batch.py`` among them);
``model.py`` gives queries and keys; ``ema.py`` moves the key encoder. Plain values and tensors come in, never a config.
Of other rooms it knows ``distributed`` (collectives, and where an engine keeps its part of a parameter),
``run.profiling`` (the names of a step's parts), ``flags.choices`` and ``errors``.
"""
