"""A server of images: engines that generate them, the queue in front of them, and the interfaces that clients speak.

``job.py`` says what is asked for and what comes back, ``service.py`` what stands between an interface and an engine.
"""
