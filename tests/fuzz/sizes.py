"""How much Hypothesis runs: CI the same little each time, ``make fuzz`` by its seed, and more.

``make fuzz`` says ``--hypothesis-profile=fuzz --hypothesis-seed=SEED`` to pytest.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

PROFILE = "fuzz"

settings.register_profile(PROFILE, derandomize=False)


def is_long() -> bool:
    """Whether ``make fuzz`` runs the tests."""
    return settings.get_current_profile_name() == PROFILE


def sized(examples: int, times: int = 10, *, steps: int = 50, shrinks: bool = True) -> settings:
    """``examples`` of CI's, ``times`` as many of ``make fuzz``; without shrinking where what is
    tested remembers."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrinks else [])]
    return settings(
        max_examples=examples * (times if is_long() else 1),
        stateful_step_count=steps,
        derandomize=not is_long(),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
