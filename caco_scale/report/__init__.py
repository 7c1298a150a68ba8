"""The report: one self-contained HTML page about a run, or several side by side. ``python -m caco_scale.report``.

``overview.py`` is ``caco runs``, a table of many runs, of which little is read. ``runs.py`` reads what a run left,
``curves.py`` and ``pictures.py`` draw, ``page.py`` puts it together, ``templates.py`` makes HTML of it and of the pages
of ``embed``. All only read: of other rooms they know ``run``, ``config``, ``checkpoint``, ``weights``, ``data``,
``evaluate.features``, ``method.model``, ``flags`` and ``errors``.
"""
