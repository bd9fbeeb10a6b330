"""``python -m vecfleet.bench``."""

from vecfleet.bench.main import main

main()
