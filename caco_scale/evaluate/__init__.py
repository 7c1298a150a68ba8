"""How good an encoder is: kNN, linear evaluation, fine-tuning; as commands, and kNN while a run trains.

``task.py`` is what every command begins with, ``run_*.py`` the commands; ``loop.py`` trains what they train
(``heads.py``: classifiers; ``listed.py``: on a published list), ``feature_cache.py`` keeps features, ``results.py`` the
result; ``knn.py`` and ``features.py`` are what training uses, too, and ``pixel_knn.py``: kNN of raw pixels, by which
encoders are judged. Of other rooms it knows ``data``, ``weights``,
``distributed``, ``optim`` (schedule, LARS's update), ``run`` (signals, environment) and ``errors``; never ``training``
or ``method``.
"""
