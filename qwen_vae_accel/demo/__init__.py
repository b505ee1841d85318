"""The main job, end to end: build engines, reload them in a new process, run a photo and a whole pipeline.

``run`` builds and starts the new process; ``reload`` is what that process does.
"""
