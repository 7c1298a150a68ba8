"""A backbone for use without this program: the file, its names in the library that loads it, its model card.

``write.py`` is the way in and the command. Of other rooms it knows ``weights`` (what to export), ``checkpoint`` and
``run`` (what the card says of a run and its scores), ``training`` (its schedule), ``config``, ``method.encoders`` and
``errors``.
"""
