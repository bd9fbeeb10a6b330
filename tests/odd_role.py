"""A role of roles.py whose leases are short, or whose machine's clock is wrong.

Run as ``python odd_role.py LEASE_S SKEW_S ROLE REDIS_URL DATA_DIR STEP_S [MAX_STEP_S]``; a lease
of 0 is the usual one.
"""

from __future__ import annotations

import datetime
import sys
import time

from vecfleet.common import keys


def shorten_leases(lease_s: float) -> None:
    """Before the rest of the product is imported: its defaults are read then."""
    assert "vecfleet.worker.ledger" not in sys.modules
    keys.LEASE_TTL_S, keys.HEARTBEAT_S = lease_s, lease_s / 5
    from vecfleet.worker import aggregator_main, heartbeat

    names = list(heartbeat.Timing.__dataclass_fields__)
    defaults = list(heartbeat.Timing.__init__.__defaults__ or ())
    defaults[names.index("rescue_s")] = lease_s / 5
    heartbeat.Timing.__init__.__defaults__ = tuple(defaults)
    assert aggregator_main._LEASE_RENEW_S > 0
    aggregator_main._LEASE_RENEW_S = lease_s / 5


def shift_clock(skew_s: float) -> None:
    """Let this process believe that it is ``skew_s`` later."""
    real_time, real_datetime = time.time, datetime.datetime

    class Shifted(real_datetime):
        @classmethod
        def now(cls, tz=None):
            return real_datetime.now(tz) + datetime.timedelta(seconds=skew_s)

    time.time = lambda: real_time() + skew_s
    datetime.datetime = Shifted


def main(lease_s: str, skew_s: str, *arguments: str) -> int:
    if float(skew_s):
        shift_clock(float(skew_s))
    if float(lease_s):
        shorten_leases(float(lease_s))
    import roles

    from vecfleet.common.logs import setup_logging

    setup_logging()
    return roles.main(*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
