"""``/sdapi/v1``: the interface that many image tools speak, over the same service.

``routes.py`` has the paths, ``reading.py`` makes jobs of requests, ``calls.py`` runs them and reports progress,
``lists.py`` has the lists that clients read first.
"""
