"""Hypothesis without deadlines: the first example of a test may compile, and the machine may be shared."""

import hypothesis

hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
