"""The contract every part of vecfleet shares: errors, names, payloads and the door to Redis."""
