"""What holds for all tests: the same examples every time, unless new ones are asked for.

``make test`` judges a change by examples that depend on the test alone, so that it fails where the
code changed and not where the dice fell. New examples: ``HYPOTHESIS_PROFILE=explore make test``.
"""

import os

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow]  # how long examples take says something of the machine only
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=SLOW)
settings.register_profile("explore", deadline=None, print_blob=True, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
