"""Examples are the same in every run: a failure that one machine sees, every machine sees."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
