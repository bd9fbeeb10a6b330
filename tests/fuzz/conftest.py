"""pytest reads this before the tests, so that the profile can be asked for by name."""

from fuzz import sizes

assert sizes.PROFILE == "fuzz"
