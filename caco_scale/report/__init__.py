"""The report: one self-contained HTML page about a run, or several side by side. ``python -m caco_scale.report``.

``runs.py`` reads what a run left, ``curves.py`` and ``pictures.py`` draw, ``page.py`` puts it together. It only reads:
of other rooms it knows ``run``, ``config``, ``checkpoint``, ``weights``, ``data``, ``evaluate.features``,
``method.model`` and ``errors``.
"""
