"""A backbone for use without this program: the file, its names in the library that loads it, its model card.

``write.py`` is the way in and the command; ``publish.py`` puts a directory on the Hugging Face hub. Of other rooms it
knows ``weights`` (what to export), ``checkpoint`` and ``run`` (what the card says of a run and its scores), its
schedule (``training``), ``config``, ``method.encoders`` and ``errors``.
"""
