"""The ``vecfleet`` command, the one-machine fleet and the demo."""
